//! What is spliced is what was asked for.

use std::{
    io::{ErrorKind, Read},
    time::Duration,
};

use shunt_tests::{
    agent::Place, bpf, deadline::wait_until, header_options::HeaderOptions, mesh::ISTIO_DEFAULTS,
};
use socket2::SockRef;

use super::{
    INTO_PROXY,
    pair::{Hop, Lab, Pair, receive, send},
};

/// Talks for so long that a connection that is to be spliced would be.
fn talk(lab: &Lab) -> u64 {
    let pair = lab.connect();
    for _ in 0..200 {
        pair.ask(b"question", b"answer");
    }
    // The last of it is counted when this is.
    send(&pair.client, b"!");
    lab.spliced_bytes()
}

#[test]
fn off_loads_and_attaches_nothing() {
    let lab = Lab::new(&["--splice", "off"]);
    assert_eq!(talk(&lab), 0);
    let status = lab.agent().status();
    assert_eq!(status["splice"]["mode"], "off");
    let names: Vec<_> = status["programs"]
        .as_array()
        .expect("programs")
        .iter()
        .collect();
    assert!(
        names
            .iter()
            .all(|program| program["name"] != "shunt_message"),
        "{names:?}"
    );
}

#[test]
fn a_pod_can_do_without() {
    let lab = Lab::new(INTO_PROXY);
    let off: Vec<&str> = ISTIO_DEFAULTS
        .into_iter()
        .chain(["--splice", "off"])
        .collect();
    lab.agent().enroll(lab.client_pod().netns(), &off);
    assert_eq!(talk(&lab), 0);
    assert_eq!(
        lab.counters()["fallbacks"]
            .as_object()
            .map(serde_json::Map::len),
        Some(0)
    );
    lab.agent()
        .enroll(lab.client_pod().netns(), &ISTIO_DEFAULTS);
    lab.spliced();
}

#[test]
fn a_pod_cannot_have_more_than_the_node_does() {
    let lab = Lab::new(&["--splice", "off"]);
    let all: Vec<&str> = ISTIO_DEFAULTS
        .into_iter()
        .chain(["--splice", "all"])
        .collect();
    lab.agent().enroll(lab.client_pod().netns(), &all);
    assert_eq!(talk(&lab), 0);
}

/// A connection whose proxy's end is known.
fn asked_twice(lab: &Lab) -> Pair {
    let pair = lab.connect();
    pair.ask(b"question", b"answer");
    pair.ask(b"another question", b"another answer");
    pair
}

/// There is nothing to be found, and nothing to be kept, of a connection that has had but one
/// request.
#[test]
fn what_has_had_one_request_is_in_no_table() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        let pairs: Vec<_> = (0..10).map(|_| lab.connect()).collect();
        for pair in &pairs {
            pair.ask(b"question", b"answer");
        }
        // What was sent again on a busy machine counts as another.
        let known = bpf::spliceable(&lab.agent().status());
        assert!(known < pairs.len() / 2, "{hop:?}: {known} entries");
        for pair in &pairs {
            pair.ask(b"another question", b"another answer");
        }
        wait_until("all of them to be known", || {
            match bpf::spliceable(&lab.agent().status()) {
                known if known >= pairs.len() => Ok(()),
                known => Err(format!("{hop:?}: {known} entries")),
            }
        });
    }
}

/// It acknowledges, and never sends anything that would be acknowledged to it.
#[test]
fn what_is_sent_to_a_proxy_that_never_answers_is_spliced() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        splice_one_way(&lab, &lab.connect());
    }
}

/// Sends until it is spliced, and no answer.
#[track_caller]
fn splice_one_way(lab: &Lab, pair: &Pair) {
    wait_until("bytes to be spliced", || {
        send(&pair.client, b"no question");
        assert_eq!(receive(&pair.server, 11), b"no question");
        match lab.spliced_bytes() {
            0 => Err(lab.counters().to_string()),
            _ => Ok(()),
        }
    });
}

/// What a socket has asked `sock_ops` for is shared by all programs.
#[test]
fn what_another_program_has_asked_for_stays() {
    for hop in Hop::BOTH {
        for other_is_first in [true, false] {
            let mut lab = Lab::without_agent(hop);
            let attach = |lab: &Lab| HeaderOptions::attach(lab.cgroup().path());
            let first = other_is_first.then(|| attach(&lab));
            lab.start_agent(Place::new(lab.cgroup()));
            let other = first.unwrap_or_else(|| attach(&lab));
            let pair = lab.connect();
            splice_one_way(&lab, &pair);
            for _ in 0..5 {
                let before = other.asked();
                // A single byte always goes by TCP.
                send(&pair.server, b"!");
                assert_eq!(receive(&pair.client, 1), b"!");
                assert!(other.asked() > before, "{hop:?}, {other_is_first}");
            }
        }
    }
}

/// A socket that sends a reset is closed already: nobody would forget it any more.
#[test]
fn a_reset_leaves_nothing() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        let pair = lab.connect();
        for answer in [b"one", b"two"] {
            send(&pair.server, answer);
            assert_eq!(receive(&pair.client, 3), answer);
        }
        SockRef::from(&pair.server)
            .set_linger(Some(Duration::ZERO))
            .expect("it is open");
        drop(pair.server);
        pair.client.set_nonblocking(false).expect("it is open");
        let error = (&pair.client).read_exact(&mut [0]).expect_err("it ends");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert_eq!(bpf::spliceable(&lab.agent().status()), 0, "{hop:?}");
    }
}

/// A table without room is no reason to do anything but TCP, and is told. The first
/// connection has its one place.
#[test]
fn what_finds_no_room_goes_by_tcp_and_is_counted() {
    type First = fn(&Lab) -> Pair;
    for (table, first) in [
        ("ENDS=1", asked_twice as First),
        ("SPLICED=1", Lab::spliced),
    ] {
        let lab = Lab::new(&[INTO_PROXY, &["--map-limit", table]].concat());
        let _first = first(&lab);
        let before = lab.spliced_bytes();
        assert_eq!(talk(&lab), before, "{table}: {}", lab.counters());
        assert!(lab.fallbacks("no_room") > 0, "{table}: {}", lab.counters());
    }
}

#[test]
fn the_node_says_what_it_does_and_why() {
    let lab = Lab::new(&[]);
    let splice = lab.agent().status()["splice"].clone();
    assert_eq!(splice["asked"], "auto");
    assert_ne!(splice["mode"], "auto");
    assert!(
        splice["reason"].as_str().is_some_and(|why| !why.is_empty()),
        "{splice}"
    );
    let trials = splice["trials"].as_array().expect("trials");
    assert!(trials.len() > 10, "{trials:?}");
}

/// Whatever ends first, and however.
#[test]
fn nothing_is_left_of_connections_that_have_ended() {
    let lab = Lab::new(INTO_PROXY);
    for application_first in [true, false] {
        let pairs: Vec<_> = (0..20).map(|_| lab.spliced()).collect();
        assert!(bpf::spliceable(&lab.agent().status()) >= 4 * pairs.len());
        for pair in pairs {
            if application_first {
                drop(pair.client);
            } else {
                drop(pair.server);
            }
        }
        wait_until("the tables to be empty", || {
            match bpf::spliceable(&lab.agent().status()) {
                0 => Ok(()),
                left => Err(format!("{left} entries are left")),
            }
        });
    }
}

#[test]
fn a_socket_in_blocking_mode_is_not_spliced() {
    let lab = Lab::new(INTO_PROXY);
    let pair = lab.connect();
    pair.client.set_nonblocking(false).expect("it is open");
    for _ in 0..200 {
        pair.ask(b"question", b"answer");
    }
    assert_eq!(lab.spliced_bytes(), 0, "{}", lab.counters());
}
