//! Sections 2 and 3 of the contract, as tables.
//!
//! Every row is asked of three: of `decide`, of Istio's rules for the same
//! settings, and of the contract, which is what is written here.

pub(crate) mod calls;
mod cases;
mod ordered_rules;

use std::fmt::{Debug, Write};

use calls::Calls;
use shunt_decide::{Rule, Verdict};
use shunt_istio_rules::{Outcome, Packet};

use crate::support::Pod;

/// One row: what happens to these calls in this pod, and which rule says so.
pub(crate) struct Row(&'static str, Pod, Calls, Verdict, Rule);

impl Row {
    /// What is wrong with it, a line for each packet.
    fn faults(&self) -> String {
        let Self(case, pod, calls, verdict, rule) = self;
        let expected = verdict
            .port(&pod.settings())
            .map_or(Outcome::Accept, Outcome::Redirect);
        let tables = pod.tables();
        let mut faults = String::new();
        for packet in calls.packets() {
            let decision = pod.decide(&packet);
            if (decision.verdict, decision.rule) != (*verdict, *rule) {
                fault(&mut faults, case, &packet, "decide", &decision);
            }
            let istio = tables.outcome(&packet);
            if istio != expected {
                fault(&mut faults, case, &packet, "iptables", &istio);
            }
        }
        faults
    }
}

fn fault(faults: &mut String, case: &str, packet: &Packet, who: &str, said: &dyn Debug) {
    writeln!(faults, "{case}\n    {who}: {said:?}\n    {packet:?}")
        .expect("a String takes whatever is written to it");
}

/// Fails with every row that does not hold.
fn assert_all(rows: &[Row]) {
    let faults: String = rows.iter().map(Row::faults).collect();
    assert!(faults.is_empty(), "\n{faults}");
}

#[test]
fn the_ordered_rules() {
    assert_all(&ordered_rules::outbound());
    assert_all(&ordered_rules::inbound());
    assert_all(&ordered_rules::families());
    assert_all(&ordered_rules::other_meshes());
}

#[test]
fn the_cases_that_are_easy_to_get_wrong() {
    assert_all(&cases::rows());
}

#[test]
fn every_rule_has_a_row() {
    let rows = [
        ordered_rules::outbound(),
        ordered_rules::inbound(),
        ordered_rules::families(),
        ordered_rules::other_meshes(),
    ];
    let tried: Vec<_> = rows.iter().flatten().map(|row| row.4).collect();
    for rule in Rule::ALL {
        // What starts inside has a test of its own: iptables cannot be asked.
        if *rule != Rule::InInside {
            assert!(tried.contains(rule), "no row for {rule:?}");
        }
    }
}

/// Such traffic has been decided over on its way out, and iptables does not see
/// it again: there is nothing to ask it here.
#[test]
fn traffic_that_starts_inside_never_takes_the_inbound_rules() {
    let pod = Pod::istio().virtual_interfaces(["lo"]).dual_stack();
    for destination in [calls::POD, calls::POD6] {
        for port in calls::ANY_PORT {
            let decision = pod.decide_inside(destination.parse().expect("an address"), port);
            assert_eq!(decision.verdict, Verdict::Direct);
            assert_eq!(decision.rule, Rule::InInside);
        }
    }
}

/// The JVM opens IPv6 sockets and connects them to `::ffff:a.b.c.d`.
#[test]
fn an_ipv4_address_in_ipv6_form_follows_the_ipv4_rules() {
    let pod = Pod::istio();
    let calls = calls::app().to([calls::REMOTE]).packets();
    for mut packet in calls {
        let plain = pod.decide(&packet);
        packet.destination = format!("::ffff:{}", packet.destination)
            .parse()
            .expect("an address");
        packet.source = format!("::ffff:{}", packet.source)
            .parse()
            .expect("an address");
        assert_eq!(plain.verdict, Verdict::Outbound);
        assert_eq!(pod.decide(&packet), plain);
    }
}

/// Whatever is asked for, an answer to the family comes first.
#[test]
fn a_pod_without_ipv4_leaves_ipv4_alone() {
    let pod = Pod::istio();
    let mut settings = pod.settings();
    settings.flags &= !shunt_abi::flags::IPV4;
    for packet in calls::app().to([calls::REMOTE]).packets() {
        assert_eq!(pod.decide_by(&settings, &packet).rule, Rule::OutFamily);
    }
    for packet in calls::outside().to([calls::POD]).packets() {
        assert_eq!(pod.decide_by(&settings, &packet).rule, Rule::InFamily);
    }
}

/// Codes that the agent never writes must not make the kernel side guess: the
/// contract's own hairpin is what is left.
#[test]
fn an_unknown_hairpin_code_is_answered_as_the_contract_says() {
    let pod = Pod::istio();
    let mut settings = pod.settings();
    settings.hairpin = 77;
    for packet in calls::anyone()
        .to([calls::POD, calls::REMOTE])
        .ports([22, 80])
        .packets()
    {
        assert_eq!(pod.decide_by(&settings, &packet), pod.decide(&packet));
    }
}
