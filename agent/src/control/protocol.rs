use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow, ensure};
use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio_util::codec::LengthDelimitedCodec;

use crate::{
    cni::protocol::CniRequest,
    node::{EnrolRequest, Status},
};

/// The longest frame, in bytes: room for settings with 65,535 ports in each list
/// and 10,000 address ranges, and a bound for everybody else.
pub const MAX_FRAME: usize = 16 * 1024 * 1024;

/// What a client asks, one for each frame.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Enrol a namespace, or replace its settings.
    Enrol(Box<EnrolRequest>),
    /// End the redirection of the namespace at this path.
    Unenrol(#[serde(deserialize_with = "crate::netns::absolute_path")] PathBuf),
    /// Say what is enrolled, counted and attached.
    Status,
    /// The runtime of the node calls the CNI plugin.
    Cni(CniRequest),
}

/// What the agent answers, one for each request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done,
    /// The answer to [`Request::Status`].
    Status(Box<Status>),
    /// It was not done, and why.
    Failed(String),
    /// It cannot be told just now whether there is anything to do, and why.
    Undecided(String),
}

/// Frames: a length of four bytes in network byte order, then that much JSON.
pub(super) fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder()
        .max_frame_length(MAX_FRAME)
        .new_codec()
}

pub(super) fn encode(message: &impl Serialize) -> Result<Bytes> {
    let json = serde_json::to_vec(message).context("cannot write the message as JSON")?;
    ensure!(
        json.len() <= MAX_FRAME,
        "the message has {} bytes, and {MAX_FRAME} is the most; shorten the lists",
        json.len()
    );
    Ok(Bytes::from(json))
}

/// Understands a message. An error names the field that is wrong.
pub(super) fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T> {
    let mut json = serde_json::Deserializer::from_slice(frame);
    let message = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let place = match error.path().to_string() {
            root if root == "." => String::new(),
            path => format!("{path}: "),
        };
        not_understood(&format!("{place}{}", error.inner()))
    })?;
    json.end()
        .map_err(|error| not_understood(&error.to_string()))?;
    Ok(message)
}

fn not_understood(why: &str) -> anyhow::Error {
    anyhow!(
        "the message cannot be understood: {}; are the agent and the command of the same version?",
        one_line(why)
    )
}

/// What may repeat the message, which can hold anything and be long.
fn one_line(text: &str) -> String {
    const LONGEST: usize = 400;
    let visible = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(LONGEST).map(visible).collect()
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_request_comes_through() {
        let frame = encode(&Request::Unenrol("/run/netns/a".into())).expect("it encodes");
        let back: Request = decode(&frame).expect("it decodes");
        assert!(matches!(back, Request::Unenrol(path) if path.as_os_str() == "/run/netns/a"));
    }

    fn valid() -> Value {
        let settings = crate::settings::tests::settings(
            "--mesh istio -u 1337,7 -x 10.0.0.0/8,::1 -q 80,443-450 -c eth1,veth+ \
             --outbound-owner-groups 5 --redirect-dns",
        )
        .expect("good flags");
        let request = Request::Enrol(Box::new(EnrolRequest {
            netns: "/run/netns/a".into(),
            resolvers: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
            settings,
            pod: None,
        }));
        serde_json::to_value(request).expect("plain data")
    }

    /// Where the values of a message are, containers among them, as JSON pointers.
    fn places(value: &Value, at: &str, found: &mut Vec<String>) {
        if !at.is_empty() {
            found.push(at.to_owned());
        }
        match value {
            Value::Object(fields) => fields
                .iter()
                .for_each(|(name, value)| places(value, &format!("{at}/{name}"), found)),
            Value::Array(items) => items
                .iter()
                .enumerate()
                .for_each(|(i, value)| places(value, &format!("{at}/{i}"), found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    fn with(place: &str, value: Value) -> Value {
        let mut message = valid();
        *message.pointer_mut(place).expect("a place in it") = value;
        message
    }

    fn decoded(message: &Value) -> Result<Request> {
        decode(&serde_json::to_vec(message).expect("it is JSON"))
    }

    /// What no flag gives comes in by no message either.
    #[test]
    fn the_conditions_on_flags_hold_for_messages() {
        for (place, value, says) in [
            ("outbound_port", json!(0), "is not a port"),
            ("inbound_port", json!(65_536), "is not a port"),
            ("tunnel_port", json!(-1), "-1"),
            ("dns_port", json!("53"), "string"),
            ("proxy_uids", json!([]), "needs one id"),
            ("proxy_uids", json!([u32::MAX]), "is not a uid"),
            (
                "proxy_gids",
                json!((0..17).collect::<Vec<u32>>()),
                "more than 16",
            ),
            (
                "inbound_include",
                json!({"listed": "80,http"}),
                "\"http\" is not a port",
            ),
            ("inbound_include", json!("some"), "some"),
            (
                "outbound_include",
                json!({"listed": ["10.0.0.0/33"]}),
                "is not an address range",
            ),
            ("outbound_exclude", json!("*"), "*"),
            (
                "outbound_exclude",
                json!(["10.0.0.0/8", "*"]),
                "\"*\" is not an address range",
            ),
            ("outbound_ports_exclude", json!("90-80"), "runs backwards"),
            (
                "excluded_interfaces",
                json!(["eth0/1"]),
                "is not an interface name",
            ),
            (
                "virtual_interfaces",
                json!([""]),
                "is not an interface name",
            ),
            (
                "virtual_interfaces",
                json!(["a,b"]),
                "is not an interface name",
            ),
            ("owner_groups", json!({"only": []}), "needs one id"),
            ("loopback", json!("0.0.0.0/0"), "is not a loopback range"),
            ("loopback", json!("10.0.0.0/8"), "is not a loopback range"),
            ("hairpin", json!("sideways"), "sideways"),
            ("dual_stack", json!("yes"), "yes"),
        ] {
            let message = with(&format!("/enrol/settings/{place}"), value);
            let error = decoded(&message).expect_err(place).to_string();
            let path = format!("enrol.settings.{place}");
            assert!(
                error.contains(&path) && error.contains(says),
                "{says:?}: {error}"
            );
        }
    }

    #[test]
    fn a_namespace_is_named_from_the_root() {
        let error = decoded(&with("/enrol/netns", json!("run/netns/a"))).expect_err("relative");
        assert!(error.to_string().contains("enrol.netns"), "{error}");
        let error = decoded(&json!({"unenrol": "a"})).expect_err("relative");
        assert!(error.to_string().contains("unenrol: \"a\""), "{error}");
    }

    #[test]
    fn a_field_that_is_unknown_or_missing_is_named() {
        let mut message = valid();
        message["enrol"]["settings"]["outbuond_port"] = json!(1);
        let error = decoded(&message).expect_err("unknown").to_string();
        assert!(error.contains("outbuond_port"), "{error}");
        let mut message = valid();
        let settings = message["enrol"]["settings"].as_object_mut();
        settings.expect("an object").remove("loopback");
        let error = decoded(&message).expect_err("missing").to_string();
        assert!(error.contains("`loopback`"), "{error}");
    }

    #[test]
    fn mapped_ranges_are_those_of_ipv4() {
        let message = with(
            "/enrol/settings/outbound_exclude",
            json!(["::ffff:10.0.0.0/104"]),
        );
        let Ok(Request::Enrol(request)) = decoded(&message) else {
            panic!("a good range");
        };
        let ranges = request.settings.outbound_exclude;
        assert_eq!(ranges, ["10.0.0.0/8".parse().expect("a range")]);
    }

    #[test]
    fn what_is_too_long_is_not_sent() {
        let message = Request::Unenrol("a".repeat(MAX_FRAME).into());
        let error = encode(&message).expect_err("too long").to_string();
        assert!(error.contains("shorten"), "{error}");
    }

    fn scalar() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (0..70_000_u32).prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            crate::settings::tests::text().prop_map(Value::from),
        ]
    }

    fn anything() -> impl Strategy<Value = Value> {
        scalar().prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".{0,8}", inner, 0..4)
                    .prop_map(|fields| Value::from(serde_json::Map::from_iter(fields))),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_frame_makes_it_panic(frame in proptest::collection::vec(any::<u8>(), 0..512)) {
            for error in [decode::<Request>(&frame).err(), decode::<Reply>(&frame).err()] {
                let said = error.map_or_else(String::new, |error| error.to_string());
                prop_assert!(!said.contains(char::is_control), "{said}");
            }
        }

        /// One value of a good request is replaced: it is still good, and then it
        /// comes through unchanged, or the error names the place.
        #[test]
        fn a_wrong_value_is_named(which in any::<prop::sample::Index>(), value in anything()) {
            let mut all = Vec::new();
            places(&valid(), "", &mut all);
            let place = which.get(&all);
            match decoded(&with(place, value)) {
                Ok(request) => {
                    let sent = serde_json::to_value(&request).expect("plain data");
                    let again = decoded(&sent).expect("it was good");
                    prop_assert_eq!(serde_json::to_value(&again).expect("plain data"), sent);
                }
                Err(error) => {
                    let said = error.to_string();
                    let name = |segment: &&str| segment.parse::<usize>().is_err();
                    let field = place.split('/').filter(name).take(3).last();
                    let field = field.expect("a place has a name");
                    prop_assert!(said.contains(field), "{place}: {said}");
                    prop_assert!(!said.contains(char::is_control), "{said}");
                    prop_assert!(said.chars().count() < 600, "{said}");
                }
            }
        }

        #[test]
        fn a_cut_request_is_an_error_that_says_so(cut in any::<prop::sample::Index>()) {
            let whole = serde_json::to_vec(&valid()).expect("plain data");
            let error = decode::<Request>(&whole[..cut.index(whole.len())]).expect_err("it is cut");
            let said = error.to_string();
            prop_assert!(said.contains("EOF") && said.contains("same version"), "{said}");
        }
    }
}
