//! Medians, quartiles and ratios of what was measured in rounds.

use serde::Serialize;

/// The middle half of some numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// The lower quartile.
    pub(crate) low: f64,
    /// The median.
    pub(crate) mid: f64,
    /// The upper quartile.
    pub(crate) high: f64,
}

impl Spread {
    /// Of these numbers; `None` when there are none, or one of them is none.
    pub(crate) fn of(numbers: &[f64]) -> Option<Self> {
        if numbers.is_empty() || numbers.iter().any(|number| !number.is_finite()) {
            return None;
        }
        let mut sorted = numbers.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            low: quantile(&sorted, 0.25),
            mid: quantile(&sorted, 0.5),
            high: quantile(&sorted, 0.75),
        })
    }
}

/// Between two neighbours it is where the line between them is.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the place is between 0 and the number of rounds"
)]
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = part * (sorted.len() - 1) as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    let share = place - place.floor();
    sorted[below] * (1.0 - share) + sorted[above] * share
}

/// What was measured in a round, divided by what was measured in the same round
/// to compare with: what disturbs a whole round disturbs both.
pub(crate) fn ratios(of: &[f64], to: &[f64]) -> Vec<f64> {
    of.iter().zip(to).map(|(of, to)| of / to).collect()
}

/// How much `of` is above `base`, round by round, against how much `to` is, of which the
/// median is taken: one difference of two noisy numbers that is near zero would say anything.
pub(crate) fn added(of: &[f64], to: &[f64], base: &[f64]) -> Option<Spread> {
    let above = |numbers: &[f64]| {
        let each: Vec<f64> = numbers
            .iter()
            .zip(base)
            .map(|(one, base)| one - base)
            .collect();
        Spread::of(&each)
    };
    let (of, whole) = (above(of)?, above(to)?.mid);
    (whole > 0.0).then_some(Spread {
        low: of.low / whole,
        mid: of.mid / whole,
        high: of.high / whole,
    })
}

/// The same of something that was measured in another phase than `to` and `base`, beside `beside`,
/// which is `base` there; `switched` is what `base` takes with the switches of that phase.
pub(crate) fn added_in_phases(
    (of, beside): (&[f64], &[f64]),
    switched: &[f64],
    (to, base): (&[f64], &[f64]),
) -> Option<Spread> {
    let differences = of.iter().zip(beside).map(|(of, beside)| of - beside);
    let whole: Vec<f64> = switched
        .iter()
        .zip(differences)
        .map(|(switched, more)| switched + more)
        .collect();
    added(&whole, to, base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_an_odd_and_of_an_even_number() {
        let odd = Spread::of(&[5.0, 1.0, 2.0, 4.0, 3.0]);
        let expected = Spread {
            low: 2.0,
            mid: 3.0,
            high: 4.0,
        };
        assert_eq!(odd, Some(expected));
        let even = Spread::of(&[4.0, 1.0]).expect("two numbers");
        assert_eq!((even.low, even.mid, even.high), (1.75, 2.5, 3.25));
    }

    #[test]
    fn nothing_has_no_middle() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[1.0, f64::NAN]), None);
        assert_eq!(Spread::of(&[1.0, f64::INFINITY]), None);
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        // A slow second round leaves no trace.
        assert_eq!(ratios(&[1.0, 10.0], &[2.0, 20.0]), [0.5, 0.5]);
        // A round that one of them did not finish is left out.
        assert_eq!(ratios(&[1.0], &[2.0, 20.0]), [0.5]);
    }

    #[test]
    fn what_is_added_is_counted_from_the_base() {
        // A slow second round leaves no trace.
        let half = added(
            &[15.0, 25.0, 16.0],
            &[20.0, 30.0, 20.0],
            &[10.0, 20.0, 10.0],
        );
        let expected = Spread {
            low: 0.5,
            mid: 0.5,
            high: 0.55,
        };
        assert_eq!(half, Some(expected));
        assert_eq!(added(&[15.0], &[10.0], &[10.0]), None);
        assert_eq!(added(&[], &[10.0], &[10.0]), None);
    }

    #[test]
    fn what_another_phase_adds_has_its_switches_in_it() {
        // The machine was slower by 4 then, and the switches take 1.
        let added = added_in_phases((&[18.0], &[15.0]), &[11.0], (&[18.0], &[10.0]));
        assert_eq!(added.map(|spread| spread.mid), Some(0.5));
        assert_eq!(
            added_in_phases((&[], &[]), &[11.0], (&[18.0], &[10.0])),
            None
        );
    }
}
