//! iperf3, which sends as much as it can.

use serde_json::Value;
use shunt_tests::Process;

use super::{Least, PORT, Spliced, World, in_every_mode, in_every_mode_with};

/// Each way alone, and with sendfile(2). When the sender has sent all, the receiver does not wait
/// for what is still on its way.
#[test]
fn one_way() {
    const RUNS: [(&[&str], u64); 3] = [
        (&[], 1),
        (&["--reverse"], 1),
        (&["--parallel=4", "--length=1000", "--zerocopy"], 4),
    ];
    let least = Least {
        connections: 9,
        // Some of it the receivers did not wait for.
        bytes: 2 * Iperf3::BYTES,
        spliced: Spliced::OneWay,
    };
    in_every_mode(least, |world| {
        let server = Iperf3::start(world);
        RUNS.map(|(run, streams)| {
            let end = server.run(run);
            assert_received(&end, "", streams);
            let sent = end["sum_sent"]["bytes"].as_u64();
            assert!(sent >= Some(Iperf3::BYTES as u64), "{run:?}: {end:#}");
            end["streams"].as_array().map(Vec::len)
        })
    });
}

/// Both ways at once, until one of them has sent all. Its server takes the first connections that
/// it accepts for those of one way, so that they have to come in the order in which its client
/// makes them: otherwise both ends wait for each other for ever, whoever is on the way.
#[test]
fn both_ways() {
    let least = Least {
        connections: 5,
        // One way has sent all, of which its receivers did not wait for what was on its way.
        bytes: Iperf3::BYTES - 2 * Iperf3::ON_ITS_WAY,
        // It is soon over.
        spliced: Spliced::AtLast,
    };
    in_every_mode_with(1, least, |world| {
        let end = Iperf3::start(world).run(&["--bidir", "--parallel=2"]);
        assert_received(&end, "", 2);
        assert_received(&end, "_bidir_reverse", 2);
        end["streams"].as_array().map(Vec::len)
    });
}

/// iperf3's server, and its client in the other pod.
struct Iperf3<'world> {
    world: &'world World,
    _server: Process,
}

impl<'world> Iperf3<'world> {
    /// What its client sends, unless it is to receive it.
    const BYTES: usize = 32 << 20;
    /// What may be on its way, of one stream: a megabyte in each of the buffers of two
    /// proxies, which have two each, and what six sockets hold.
    const ON_ITS_WAY: usize = 6 << 20;

    fn start(world: &'world World) -> Self {
        small_buffers(world);
        let server = ["iperf3", "--server", "--port", &PORT.to_string()];
        Self {
            world,
            _server: world.server.serve(PORT, &server),
        }
    }

    /// The end of what its client says.
    fn run(&self, options: &[&str]) -> Value {
        let world = self.world;
        let [ip, port, bytes] = [
            world.ip().to_string(),
            PORT.to_string(),
            Self::BYTES.to_string(),
        ];
        let line = [
            "iperf3", "--client", &ip, "--port", &port, "--bytes", &bytes,
        ];
        let said = world
            .client
            .output(&[&line[..], &["--json"], options].concat());
        let mut said: Value = serde_json::from_str(&said).expect("iperf3 writes JSON");
        said["end"].take()
    }
}

/// The sockets on the way hold so little that it is known what the receiver of a stream may
/// not have waited for.
fn small_buffers(world: &World) {
    for host in [&world.client, &world.server] {
        for name in ["net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"] {
            host.pod().sysctl(name, "4096 65536 131072");
        }
    }
}

/// Compares the sums of one direction, whose names end with this.
#[track_caller]
fn assert_received(end: &Value, direction: &str, streams: u64) {
    let count = |sum: &str| {
        let bytes = &end[format!("{sum}{direction}")]["bytes"];
        bytes
            .as_u64()
            .unwrap_or_else(|| panic!("{sum}{direction} is missing: {end:#}"))
    };
    let (sent, received) = (count("sum_sent"), count("sum_received"));
    let missing = sent.checked_sub(received);
    let missing = missing.unwrap_or_else(|| panic!("{received} bytes came, of {sent}: {end:#}"));
    assert!(
        missing <= streams * Iperf3::ON_ITS_WAY as u64,
        "{missing} of {sent} bytes did not come: {end:#}"
    );
}
