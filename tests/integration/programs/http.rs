//! HTTP servers and clients.

use shunt_tests::Process;

use super::{Host, PORT, World, assert_same_bytes, bytes, in_every_mode};

/// What is fetched: nothing, what fits into one packet, and what fits into no
/// buffer.
const FILES: [(&str, usize); 3] = [("empty", 0), ("small", 700), ("large", 4 << 20)];

fn file(name: &str) -> Vec<u8> {
    let (seed, (_, size)) = FILES
        .iter()
        .enumerate()
        .find(|(_, (known, _))| *known == name)
        .unwrap_or_else(|| panic!("{name} is none of the files"));
    bytes(seed as u64, *size)
}

/// Gives a host the files.
fn supply(host: &Host) {
    for (name, _) in FILES {
        host.write(name, file(name));
    }
}

fn nginx(host: &Host) -> Process {
    supply(host);
    let config = include_str!("../../fixtures/nginx.conf").replace("PORT", &PORT.to_string());
    host.write("nginx.conf", config);
    let prefix = host.path("");
    let prefix = prefix.to_str().expect("a path of this test");
    host.serve(
        PORT,
        &["nginx", "-p", prefix, "-c", "nginx.conf", "-e", "stderr"],
    )
}

/// Fetches each file alone and all on one connection; what curl says of it.
fn curl_gets(world: &World) -> Vec<String> {
    let client = &world.client;
    let ask = |arguments: &[&str]| {
        let shown = "%{http_code} %{size_download} %{num_connects}\n";
        let options = ["curl", "--silent", "--show-error", "--write-out", shown];
        client.output(&[&options, arguments].concat())
    };
    let mut said = Vec::new();
    for (name, _) in FILES {
        let url = world.url(name);
        said.push(ask(&["--output", name, &url]));
        assert_same_bytes(name, &client.read(name), &file(name));
    }
    let several = world.url("{small,large,empty,small,large}");
    said.push(ask(&["--output", "again-#1", &several]));
    for (name, _) in FILES {
        let again = client.read(&format!("again-{name}"));
        assert_same_bytes(name, &again, &file(name));
    }
    let parallel = world.url("large?[1-8]");
    said.push(ask(&[
        "--parallel",
        "--parallel-immediate",
        "--output",
        "parallel-#1",
        &parallel,
    ]));
    for number in 1..=8 {
        let one = client.read(&format!("parallel-{number}"));
        assert_same_bytes("one of eight", &one, &file("large"));
    }
    said.push(ask(&[
        "--range",
        "100-299",
        "--output",
        "range",
        &world.url("large"),
    ]));
    assert_same_bytes("a range", &client.read("range"), &file("large")[100..300]);
    said.push(ask(&["--output", "none", &world.url("none")]));
    said.push(ask(&["--head", "--output", "head", &world.url("large")]));
    said
}

#[test]
fn curl_and_nginx() {
    in_every_mode((12, 11 * 4 << 20), |world| {
        let _nginx = nginx(&world.server);
        let mut said = curl_gets(world);
        // With a pause for "100 Continue", and without one.
        for (name, _) in FILES {
            world.client.write("up", file(name));
            let to = world.url(&format!("put-{name}"));
            said.push(world.client.output(&[
                "curl",
                "--silent",
                "--upload-file",
                "up",
                "--write-out",
                "%{http_code} %{size_upload}",
                &to,
            ]));
            let arrived = world.server.read(&format!("put-{name}"));
            assert_same_bytes(name, &arrived, &file(name));
        }
        said
    });
}
