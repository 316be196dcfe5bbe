//! The agent against the kernel's own rules: two pods, one with real iptables
//! rules and one enrolled with the same settings, are asked the same questions,
//! and the answers must be equal.

mod compare;
mod documentation;
mod expect;
mod probes;
mod random;
mod row;
mod setting;
mod table;
mod world;

use std::{
    collections::BTreeMap,
    fmt::{Display, Write},
};

use shunt_tests::{Node, Owner, Probe, Stack, iptables::RuleSet};

use compare::Fault;
use documentation::{Cell, Line};
use expect::Explainer;
use probes::{Class, From, Question, SourcePorts, Version, combinations, questions};
use setting::{Deviation, Mesh, Setting};
use world::{By, Pair, Wanted};

macro_rules! rule_sets {
    ($($file:literal,)*) => {
        [$(RuleSet { name: $file, text: include_str!(concat!("../oracle/", $file)) },)*]
    };
}

/// Rules that real sidecars carried.
const RULE_SETS: [RuleSet; 9] = rule_sets! {
    "istio-1.1.rules",
    "istio-1.13.rules",
    "istio-1.21.rules",
    "istio-redirect.rules",
    "lists-include.rules",
    "lists-exclude.rules",
    "capture-nothing.rules",
    "capture-loopback.rules",
    "two-owners.rules",
};

/// How many faults are shown: enough to see what is wrong.
const SHOWN: usize = 40;

/// Fails with the faults, if there are any.
#[track_caller]
fn assert_none<T: Display>(faults: &[T]) {
    let shown = faults.iter().take(SHOWN);
    let text = shown.fold(String::new(), |mut text, fault| {
        writeln!(text, "{fault}").expect("a string takes everything");
        text
    });
    assert!(faults.is_empty(), "{} faults\n{text}", faults.len());
}

/// What is asked differs from the rules on purpose.
fn deviation(setting: &Setting, question: &Question) -> Option<Deviation> {
    match question.from {
        From::Machine => setting.deviation_of_machines(),
        From::Pod | From::Outside => None,
    }
}

/// Asks both worlds, the second of which is redirected by an agent, and says
/// what is not as it should be: where the answers differ, and where the kernel
/// does not do what `explain` says.
fn examine(pair: &Pair, setting: &Setting, questions: &[Question]) -> Vec<Fault> {
    let wanted = Wanted::from(setting);
    let answers = pair.ask((&wanted, &wanted), questions);
    let explainer = Explainer::new(setting);
    questions
        .iter()
        .zip(&answers)
        .filter_map(|(question, answers)| {
            let differs = match deviation(setting, question) {
                Some(_) => None,
                None => Fault::difference(question, answers),
            };
            differs.or_else(|| explainer.fault(question, &answers.1))
        })
        .collect()
}

/// The texts of faults, each with its setting.
fn about<'a>(setting: &Setting, faults: &'a [Fault]) -> impl Iterator<Item = String> + 'a {
    let setting = format!("{setting} in a pod of {:?}", setting.stack);
    faults
        .iter()
        .map(move |fault| format!("{setting}\n{fault}"))
}

#[test]
fn the_rules_of_real_sidecars() {
    let pair = Pair::new(By::Rules, By::Agent);
    let setting = Setting {
        stack: Stack::V4,
        ..Setting::of(Mesh::Istio)
    };
    let mut ports = SourcePorts::default();
    let mut faults = Vec::new();
    for rules in RULE_SETS {
        let questions = combinations(&setting, Version::V4, &mut ports);
        let flags = rules.settings().into_iter().map(str::to_owned).collect();
        let wanted = Wanted {
            ipv4_rules: rules.text.to_owned(),
            flags,
            ..Wanted::from(&setting)
        };
        let answers = pair.ask((&wanted, &wanted), &questions);
        let both = questions.iter().zip(&answers);
        let differences = both.filter_map(|(question, both)| Fault::difference(question, both));
        faults.extend(differences.map(|fault| format!("{}: {fault}", rules.name)));
    }
    assert_none(&faults);
}

/// What the classes leave out, asked of the base settings.
#[test]
fn every_owner_from_every_source_to_every_destination() {
    let pair = Pair::new(By::Rules, By::Agent);
    let mut ports = SourcePorts::default();
    for version in Version::ALL {
        let questions = combinations(&base(), version, &mut ports);
        assert_none(&examine(&pair, &base(), &questions));
    }
}

/// A difference between two pods is one of their redirection, not of chance.
#[test]
fn the_same_rules_give_the_same_answers_twice() {
    let pair = Pair::new(By::Rules, By::Rules);
    assert_none(&examine(&pair, &base(), &all_questions(&base())));
}

/// The comparison sees what it is there to see.
#[test]
fn a_pod_without_rules_gives_other_answers() {
    let pair = Pair::new(By::Rules, By::Nothing);
    let setting = base();
    let mut questions = all_questions(&setting);
    // What nobody redirects and nobody answers would only take its time.
    questions.retain(|question| question.class != Class::Bound);
    let wanted = Wanted::from(&setting);
    let answers = pair.ask((&wanted, &wanted), &questions);
    let explainer = Explainer::new(&setting);
    for outside in [Node::OUTSIDE, Node::OUTSIDE6] {
        // Among others: an application's call to the outside.
        let call = Probe::new(Owner::APP, (outside, 80));
        let asked = |(question, _): &(&Question, _)| question.probe == call;
        let mut all = questions.iter().zip(&answers);
        let (question, answers) = all.find(asked).expect("it is asked");
        assert!(Fault::difference(question, answers).is_some());
        assert!(explainer.fault(question, &answers.0).is_none());
        assert!(explainer.fault(question, &answers.1).is_some());
    }
}

fn base() -> Setting {
    Setting::of(Mesh::Istio)
}

fn all_questions(setting: &Setting) -> Vec<Question> {
    questions(setting, &mut SourcePorts::default())
}

/// Every setting of the table, and what the documentation says of it.
#[test]
fn every_setting_of_the_table() {
    let pair = Pair::new(By::Rules, By::Agent);
    let mut ports = SourcePorts::default();
    let mut faults = Vec::new();
    let mut lines = Vec::new();
    for setting in table::settings() {
        let questions = questions(&setting, &mut ports);
        let found = examine(&pair, &setting, &questions);
        faults.extend(about(&setting, &found));
        let mut cells = BTreeMap::<_, Cell>::new();
        for question in &questions {
            let cell = cells.entry(question.class).or_default();
            match deviation(&setting, question) {
                Some(deviation) => cell.deviation = Some(deviation),
                None => drop(cell.equal.insert(question.version)),
            }
        }
        lines.push(Line { setting, cells });
    }
    assert_none(&faults);
    documentation::check(&lines);
}

/// Rules and agent can stand in one pod, which then behaves like either alone.
#[test]
fn rules_and_agent_together() {
    let pair = Pair::new(By::Rules, By::Both);
    let mut ports = SourcePorts::default();
    let mut faults = Vec::new();
    for setting in table::base() {
        let questions = questions(&setting, &mut ports);
        faults.extend(about(&setting, &examine(&pair, &setting, &questions)));
    }
    assert_none(&faults);
}

#[test]
fn drawn_settings() {
    let pair = Pair::new(By::Rules, By::Agent);
    let mut ports = SourcePorts::default();
    let mut reports = Vec::new();
    for seed in random::seeds() {
        let (drawn, drawn_questions) = random::draw(seed, &mut ports);
        let faults = examine(&pair, &drawn, &drawn_questions);
        let Some(mut fault) = faults.into_iter().next() else {
            continue;
        };
        // Only the connections of the kind that has shown it are asked again.
        let kind = |question: &Question| (question.class, question.version);
        let wanted = kind(&fault.question);
        let smallest = random::shrink(drawn.clone(), |smaller| {
            let mut questions = questions(smaller, &mut ports);
            questions.retain(|question| kind(question) == wanted);
            let found = examine(&pair, smaller, &questions).into_iter().next();
            let fails = found.is_some();
            fault = found.unwrap_or_else(|| Fault::new(&fault.question, fault.text().to_owned()));
            fails
        });
        reports.push(random::report(seed, &drawn, &smallest, &fault));
    }
    assert_none(&reports);
}

/// A difference is found, and made small: the second pod is not enrolled.
#[test]
fn a_difference_of_a_drawn_setting_is_made_small() {
    let pair = Pair::new(By::Rules, By::Nothing);
    let mut ports = SourcePorts::default();
    let mut fails = |setting: &Setting| {
        let mut questions = questions(setting, &mut ports);
        questions.retain(|question| question.class == Class::Inbound);
        let wanted = Wanted::from(setting);
        let answers = pair.ask((&wanted, &wanted), &questions);
        let mut both = questions.iter().zip(&answers);
        both.any(|(question, both)| Fault::difference(question, both).is_some())
    };
    let drawn = (1..).map(|seed| random::draw(seed, &mut SourcePorts::default()).0);
    let mut drawn = drawn.filter(|setting| setting.flags().len() > 8);
    let drawn = drawn.find(&mut fails).expect("one of many is captured");
    let smallest = random::shrink(drawn, fails).to_string();
    assert!(
        smallest.starts_with("-b ") && smallest.split(' ').count() <= 3,
        "{smallest}"
    );
}

/// The command line says what the library says, which all else here asks.
#[test]
fn the_command_explains_as_the_library_does() {
    let directory = shunt_tests::leftovers::temp_dir("explain");
    for (index, setting) in table::settings().iter().enumerate() {
        let questions = all_questions(setting);
        let flag = world::resolv_conf(directory.path(), setting.resolvers());
        // Others for each setting, from all classes.
        for question in questions.iter().skip(index).step_by(331) {
            Explainer::new(setting).ask_command(question, &flag);
        }
    }
}
