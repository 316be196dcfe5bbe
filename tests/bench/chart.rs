//! The picture: everything as a ratio to iptables-nft.

use anyhow::anyhow;
use plotters::prelude::*;

use crate::{
    figures::{
        BULK, CONNECT_CALL, CYCLES, MEMORY, REQUEST_4K, REQUEST_64, REQUEST_64K, REQUEST_500K,
        REQUEST_CPU,
    },
    report::{Figure, Report},
    stats::{Spread, ratios},
    world::{Kind, Way},
};

const FIGURES: &[(Figure, &str)] = &[
    (REQUEST_64, "64 B"),
    (REQUEST_4K, "4 KiB"),
    (REQUEST_64K, "64 KiB"),
    (REQUEST_500K, "500 kB"),
    (REQUEST_CPU, "CPU/request"),
    (CONNECT_CALL, "connect()"),
    (MEMORY, "memory"),
    (BULK, "bulk ↑"),
    (CYCLES, "conn/s ↑"),
];

const WAYS: &[(&str, RGBColor)] = &[
    (Way::DIRECT, RGBColor(190, 190, 190)),
    (Way::EXPLICIT, RGBColor(120, 120, 120)),
    (Way::SHUNT_OFF, RGBColor(158, 202, 225)),
    (Way::SHUNT_BETWEEN, RGBColor(107, 174, 214)),
    (Way::SHUNT_PROXY, RGBColor(49, 130, 189)),
    (Way::SHUNT_ALL, RGBColor(8, 69, 148)),
];

const SIZE: (u32, u32) = (1000, 420);
/// The largest ratio that is drawn; the tables have the others.
const HIGHEST: f64 = 3.0;

/// One bar.
struct Column {
    way: &'static str,
    from: f64,
    to: f64,
    ratio: f64,
}

/// Draws what was measured with the minimal proxies, else with the Envoys, as
/// SVG.
pub(crate) fn draw(report: &Report) -> anyhow::Result<String> {
    let has = |name| report.settings.iter().any(|setting| setting.name == name);
    let kinds = [Kind::Minimal, Kind::Envoy].map(Kind::name);
    let kind = kinds
        .into_iter()
        .find(|&kind| has(kind))
        .unwrap_or(kinds[0]);
    let mut svg = String::new();
    paint(&mut svg, kind, &columns(report, kind))
        .map_err(|error| anyhow!("cannot draw the chart: {error}"))?;
    Ok(svg)
}

#[expect(clippy::cast_precision_loss, reason = "there are few of them")]
fn columns(report: &Report, kind: &str) -> Vec<Column> {
    let width = 0.8 / WAYS.len() as f64;
    let mut columns = Vec::new();
    for (place, (figure, _)) in FIGURES.iter().enumerate() {
        let reference = report.rounds(kind, *figure, Way::IPTABLES_NFT);
        for (number, (way, _)) in WAYS.iter().enumerate() {
            let rounds = report.rounds(kind, *figure, way);
            if let Some(spread) = Spread::of(&ratios(rounds, reference)) {
                let from = place as f64 - 0.4 + number as f64 * width;
                columns.push(Column {
                    way,
                    from,
                    to: from + width * 0.9,
                    ratio: spread.mid.min(HIGHEST),
                });
            }
        }
    }
    columns
}

type Failed = DrawingAreaErrorKind<std::io::Error>;

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "there are few figures"
)]
fn paint(svg: &mut String, kind: &str, columns: &[Column]) -> Result<(), Failed> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let right = FIGURES.len() as f64 - 0.5;
    let highest = columns
        .iter()
        .map(|column| column.ratio)
        .fold(1.2, f64::max);
    let mut chart = ChartBuilder::on(&area)
        .caption(
            format!("Ratio to iptables-nft, {kind} (less is better, but for ↑)"),
            ("sans-serif", 18),
        )
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(40)
        .build_cartesian_2d(-0.5..right, 0.0..highest * 1.05)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(FIGURES.len())
        .x_label_formatter(&|x| {
            let figure = FIGURES.get(x.round() as usize);
            figure.map_or_else(String::new, |(_, name)| (*name).to_owned())
        })
        .label_style(("sans-serif", 13))
        .draw()?;
    for (way, color) in WAYS {
        let own = columns.iter().filter(|column| column.way == *way);
        let bars = own.map(
            |Column {
                 from, to, ratio, ..
             }| { Rectangle::new([(*from, 0.0), (*to, *ratio)], color.filled()) },
        );
        let bars: Vec<_> = bars.collect();
        if bars.is_empty() {
            continue;
        }
        let color = *color;
        chart
            .draw_series(bars)?
            .label(*way)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], color.filled()));
    }
    chart.draw_series(LineSeries::new([(-0.5, 1.0), (right, 1.0)], &BLACK))?;
    chart
        .configure_series_labels()
        .label_font(("sans-serif", 13))
        .background_style(WHITE)
        .draw()?;
    area.present()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;

    #[test]
    fn bars_have_the_height_of_their_ratio() {
        let mut report = Report::new(Machine::example(), String::new());
        report.add(Kind::Minimal.name(), REQUEST_64, Way::IPTABLES_NFT, 100.0);
        report.add(Kind::Minimal.name(), REQUEST_64, Way::DIRECT, 50.0);
        let columns = columns(&report, Kind::Minimal.name());
        assert_eq!(columns.len(), 1);
        assert_eq!((columns[0].way, columns[0].ratio), (Way::DIRECT, 0.5));
        let svg = draw(&report).expect("a chart");
        assert!(svg.starts_with("<svg") && svg.contains("direct"), "{svg}");
    }

    #[test]
    fn a_report_without_figures_has_a_chart_without_bars() {
        let report = Report::new(Machine::example(), String::new());
        assert!(draw(&report).expect("a chart").contains("</svg>"));
    }
}
