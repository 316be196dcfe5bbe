//! A proxy, or an application, that is replaced while connections are open, as with a
//! hot restart: both listen on the same port (SO_REUSEPORT) for some time.

use std::net::Shutdown;

use shunt_tests::{Record, Splice, end::nothing};
use socket2::SockRef;

use super::{Ends, Lab, MODES, Manner, Side, listen};

/// What goes back and forth on a connection.
fn exchange(ends: &Ends) {
    assert_eq!(ends.app.send("question"), Ok(8));
    ends.peer.gets("question");
    assert_eq!(ends.peer.send("answer"), Ok(6));
    ends.app.gets("answer");
}

/// Everything that the applications see while their proxies are replaced.
fn proxy_replaced(mode: Option<Splice>, manner: Manner) -> Vec<String> {
    let mut lab = Lab::kept(mode);
    let record = Record::default();
    let old = lab.ends(manner, Side::Client, &record);
    let newer = lab.new_proxies();
    let older = std::mem::replace(&mut lab.proxies, newer);
    for proxy in &older {
        proxy.stop_listening();
    }
    exchange(&old);
    // Spliced as the first was.
    let new = lab.ends(manner, Side::Client, &record);
    exchange(&new);
    exchange(&old);
    drop(older);
    // It has closed what was open.
    assert_eq!(old.app.gets_end(), nothing());
    assert_eq!(old.peer.gets_end(), nothing());
    exchange(&new);
    let third = lab.ends(manner, Side::Server, &record);
    exchange(&third);
    exchange(&new);
    record.lines()
}

/// The applications see the same in both modes.
#[track_caller]
fn compare(script: fn(Option<Splice>, Manner) -> Vec<String>) {
    for manner in Manner::ALL {
        let [plain, spliced] = MODES.map(|mode| script(mode(), manner));
        assert_eq!(plain, spliced, "{manner:?}");
    }
}

#[test]
fn a_proxy_is_replaced() {
    compare(proxy_replaced);
}

/// Nobody listens for a while. The connections that are open have ended, and
/// those of the next proxy are as good as the first.
fn proxy_ends_and_another_starts(mode: Option<Splice>, manner: Manner) -> Vec<String> {
    let mut lab = Lab::kept(mode);
    let record = Record::default();
    for _ in 0..3 {
        let ends = lab.ends(manner, Side::Client, &record);
        exchange(&ends);
        lab.proxies = lab.new_proxies();
        assert_eq!(ends.app.gets_end(), nothing());
        assert_eq!(ends.peer.gets_end(), nothing());
    }
    record.lines()
}

#[test]
fn a_proxy_ends_and_another_starts() {
    compare(proxy_ends_and_another_starts);
}

/// Everything that the applications see while the one that is called is replaced.
fn application_replaced(mode: Option<Splice>, manner: Manner) -> Vec<String> {
    let mut lab = Lab::kept(mode);
    let record = Record::default();
    let old = lab.ends(manner, Side::Server, &record);
    let newer = lab.server.netns().run(listen);
    exchange(&old);
    // A child that another test has just forked has it, too, until it calls exec: closed here
    // alone it would go on to listen.
    let older = std::mem::replace(&mut lab.listener, newer);
    SockRef::from(&older)
        .shutdown(Shutdown::Both)
        .expect("it listens");
    drop(older);
    let new = lab.ends(manner, Side::Server, &record);
    exchange(&new);
    exchange(&old);
    old.app.close();
    assert_eq!(old.peer.gets_end(), nothing());
    exchange(&new);
    record.lines()
}

#[test]
fn an_application_is_replaced() {
    compare(application_replaced);
}
