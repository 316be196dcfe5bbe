//! Any settings: Istio's rules for them, read by the interpreter, say what
//! `decide` says.

use proptest::{collection::vec, prelude::ProptestConfig, prop_assert_eq, proptest};
use shunt_istio_rules::Outcome;

use crate::{
    contract::calls::{POD, REMOTE, outside},
    random,
    support::Pod,
};

proptest! {
    #![proptest_config(ProptestConfig { cases: 384, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decide_says_what_istios_rules_say(pod in random::pod(), packets in vec(random::packet(), 48)) {
        let tables = pod.tables();
        for packet in packets {
            prop_assert_eq!(
                pod.outcome(&packet),
                tables.outcome(&packet),
                "decide, then iptables, on {:?}: {:?}\n{}",
                packet,
                pod.decide(&packet),
                pod.rules.ipv4()
            );
            // What shunt does not even ask about.
            if !pod.may_capture(&packet) {
                prop_assert_eq!(tables.outcome(&packet), Outcome::Accept, "{:?}", packet);
            }
        }
    }
}

/// Two corners in which the contract asks for more than Istio's rules do: Istio
/// captures what comes through a virtual interface only as far as `-i` goes, and
/// lets `-k` go before `-c`.
#[test]
fn istio_knows_less_of_virtual_interfaces() {
    let narrow = Pod::istio()
        .ranges(["192.0.2.0/24"])
        .virtual_interfaces(["net1"]);
    let both = Pod::istio()
        .virtual_interfaces(["net1"])
        .exclude_interfaces(["net1"]);
    for packet in outside().to([POD, REMOTE]).through("net1").packets() {
        assert_eq!(narrow.outcome(&packet), Outcome::Redirect(15001));
        assert_eq!(narrow.tables().outcome(&packet), Outcome::Accept);
        assert_eq!(both.outcome(&packet), Outcome::Accept);
        assert_eq!(both.tables().outcome(&packet), Outcome::Redirect(15001));
    }
}
