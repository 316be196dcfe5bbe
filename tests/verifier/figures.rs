//! What a program cost the verifier, from its log and from the program.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::load::Loaded;

/// The granularity in which kernels count the stack of a function, in bytes. Since Linux
/// 6.8 it is 16 where programs are compiled: then this counts no less than the kernel.
const GRANULARITY: u32 = 32;

/// What one program cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Figures {
    /// Its name, of which the kernel keeps 15 characters.
    pub(crate) program: String,
    /// Instructions that were looked at, each as often as it was.
    pub(crate) instructions: u32,
    /// States that were kept to compare others with, in all.
    pub(crate) total_states: u32,
    /// And at one time.
    pub(crate) peak_states: u32,
    /// Bytes of stack: the most that one of its functions has.
    pub(crate) stack: u32,
    /// Bytes of stack of functions that call each other, on the deepest way.
    pub(crate) combined_stack: u32,
}

impl Figures {
    /// Those of a program.
    ///
    /// # Errors
    ///
    /// When the verifier's log is not understood.
    pub(crate) fn of(loaded: &Loaded) -> Result<Self> {
        let read = || -> Result<Self> {
            let stacks = stacks(&loaded.log)?;
            let functions = Functions::of(&loaded.instructions)?;
            Ok(Self {
                program: loaded.name.clone(),
                instructions: number(&loaded.log, "processed")?,
                total_states: number(&loaded.log, "total_states")?,
                peak_states: number(&loaded.log, "peak_states")?,
                stack: stacks.iter().copied().max().unwrap_or_default(),
                combined_stack: functions.deepest(&stacks)?,
            })
        };
        read().with_context(|| {
            format!(
                "the verifier's log of {} is not understood: {:?}",
                loaded.name, loaded.log
            )
        })
    }
}

/// The number after a word of the log, where a number comes after it: since Linux 7.2 a
/// line says how many were processed of each function, as a sum.
fn number(log: &str, after: &str) -> Result<u32> {
    let words = log.split_whitespace();
    let mut pairs = words.clone().zip(words.skip(1));
    let number =
        pairs.find_map(|(word, next)| (word == after).then(|| next.parse().ok()).flatten());
    number.with_context(|| format!("there is no number after {after}"))
}

/// The bytes of stack of each function, in the order of the functions.
fn stacks(log: &str) -> Result<Vec<u32>> {
    let line = log
        .lines()
        .find_map(|line| line.strip_prefix("stack depth "));
    let sum = line.and_then(|line| line.split_whitespace().next());
    sum.context("no stack depth")?
        .split('+')
        .map(|part| part.parse().context("a stack depth is no number"))
        .collect()
}

/// The functions of a program, and who calls whom.
#[derive(Debug, PartialEq, Eq)]
struct Functions {
    /// By the place of the function: the places of those that it calls.
    calls: Vec<BTreeSet<usize>>,
}

impl Functions {
    /// Finds them as the kernel does: a function begins at the first instruction, and
    /// where a call leads.
    fn of(instructions: &[[u8; 8]]) -> Result<Self> {
        let calls: Vec<(usize, usize)> = instructions
            .iter()
            .enumerate()
            .filter_map(|(place, instruction)| Some((place, target(place, instruction)?)))
            .collect();
        let starts: BTreeMap<usize, usize> = iter::once(0)
            .chain(calls.iter().map(|(_, to)| *to))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .enumerate()
            .map(|(function, start)| (start, function))
            .collect();
        let mut functions = Self {
            calls: vec![BTreeSet::new(); starts.len()],
        };
        for (from, to) in calls {
            let (_, caller) = starts.range(..=from).next_back().context("0 is a start")?;
            functions.calls[*caller].insert(starts[&to]);
        }
        Ok(functions)
    }

    /// The bytes of stack on the deepest way, where the log tells of these. The kernel
    /// removes functions that nothing reaches before it tells: those have none, and which
    /// ones they are is not told. Of all the ways to place the others, the deepest counts.
    fn deepest(&self, stacks: &[u32]) -> Result<u32> {
        let functions = self.calls.len();
        let removed = functions.checked_sub(stacks.len()).with_context(|| {
            format!(
                "it is of {} functions, the program has {functions}",
                stacks.len()
            )
        })?;
        placements(stacks, removed)
            .iter()
            .map(|placed| self.below(0, placed, functions))
            .try_fold(0, |most, depth| Ok(depth?.max(most)))
    }

    /// The same from `function` on. `left` bounds the way: no function calls itself.
    fn below(&self, function: usize, stacks: &[u32], left: usize) -> Result<u32> {
        let left = left.checked_sub(1).context("a function calls itself")?;
        let own = stacks[function].max(1).next_multiple_of(GRANULARITY);
        let called = self.calls[function]
            .iter()
            .map(|called| self.below(*called, stacks, left))
            .try_fold(0, |most, depth| Ok::<_, anyhow::Error>(depth?.max(most)))?;
        Ok(own + called)
    }
}

/// The ways to put so many zeros between these, the first of which stays where it is.
fn placements(stacks: &[u32], zeros: usize) -> Vec<Vec<u32>> {
    let Some((first, rest)) = stacks.split_first() else {
        return vec![vec![0; zeros]];
    };
    (0..=zeros)
        // Zeros behind the first, and the rest behind those.
        .filter(|behind| !rest.is_empty() || *behind == zeros)
        .flat_map(|behind| {
            placements(rest, zeros - behind)
                .into_iter()
                .map(move |tail| {
                    let zeros = iter::repeat_n(0, behind);
                    iter::once(*first).chain(zeros).chain(tail).collect()
                })
        })
        .collect()
}

/// `BPF_JMP | BPF_CALL`
const CALL: u8 = 0x85;
/// `BPF_PSEUDO_CALL`: of a function of the program.
const OF_FUNCTION: u8 = 1;
/// `BPF_LD | BPF_IMM | BPF_DW`
const LOAD: u8 = 0x18;
/// `BPF_PSEUDO_FUNC`: the address of a function, which a helper calls.
const FUNCTION: u8 = 4;

/// The instruction to which a call at `place` leads.
fn target(place: usize, &[code, registers, _, _, a, b, c, d]: &[u8; 8]) -> Option<usize> {
    let source = registers >> 4;
    let leads = matches!((code, source), (CALL, OF_FUNCTION) | (LOAD, FUNCTION));
    let distance = i32::from_ne_bytes([a, b, c, d]);
    leads
        .then(|| place.checked_add_signed(distance as isize + 1))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "verification time 123 usec\n\
                       stack depth 72+16+0\n\
                       processed 1234 insns (limit 1000000) max_states_per_insn 4 \
                       total_states 56 peak_states 50 mark_read 10\n";

    fn call(distance: i32) -> [u8; 8] {
        let [a, b, c, d] = distance.to_ne_bytes();
        [CALL, OF_FUNCTION << 4, 0, 0, a, b, c, d]
    }

    /// `exit`
    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn the_deepest_way_counts() {
        // The first calls the second and the third; the second calls the third.
        let program = [call(2), call(3), EXIT, call(1), EXIT, EXIT];
        let loaded = Loaded {
            name: "shunt_connect4".to_owned(),
            instructions: program.to_vec(),
            log: LOG.to_owned(),
        };
        let figures = Figures::of(&loaded).expect("a log");
        assert_eq!(
            figures,
            Figures {
                program: "shunt_connect4".to_owned(),
                instructions: 1234,
                total_states: 56,
                peak_states: 50,
                stack: 72,
                combined_stack: 96 + 32 + 32,
            }
        );
    }

    /// One function of three is not in the log: it may be either that is called.
    #[test]
    fn a_function_that_was_removed_may_be_any() {
        assert_eq!(placements(&[8, 9], 1), [[8, 9, 0], [8, 0, 9]]);
        assert_eq!(placements(&[8], 2), [[8, 0, 0]]);
        // The first calls the second, which calls the third.
        let functions = Functions::of(&[call(1), EXIT, call(0), EXIT]).expect("three");
        assert_eq!(functions.calls.len(), 3);
        assert_eq!(functions.deepest(&[64, 40]).expect("it ends"), 64 + 64 + 32);
    }

    #[test]
    fn what_newer_kernels_add_is_passed_over() {
        let loaded = Loaded {
            name: "shunt_lookup".to_owned(),
            instructions: vec![call(0), EXIT, EXIT],
            log: "stack depth 216+0 max 224\n\
                  insns processed 17425+66\n\
                  processed 17491 insns (limit 1000000) total_states 605 peak_states 425\n"
                .to_owned(),
        };
        let figures = Figures::of(&loaded).expect("a log");
        assert_eq!((figures.instructions, figures.stack), (17_491, 216));
    }

    #[test]
    fn a_log_of_another_program_is_refused() {
        let loaded = Loaded {
            name: "shunt_connect4".to_owned(),
            instructions: vec![EXIT],
            log: LOG.to_owned(),
        };
        Figures::of(&loaded).expect_err("three functions");
    }
}
