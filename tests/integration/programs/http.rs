//! HTTP servers and clients.

use shunt_tests::Process;

use super::{
    Host, Least, PORT, Spliced, World, assert_same_bytes, bytes, host::PYTHON, in_every_mode,
};

const LARGE: usize = 4 << 20;

/// What is fetched: nothing, what fits into one packet, and what fits into no
/// buffer.
const FILES: [(&str, usize); 3] = [("empty", 0), ("small", 700), ("large", LARGE)];

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
    let often = world.url("small?[1-200]");
    said.push(ask(&["--output", "often-#1", &often]));
    for number in 1..=200 {
        let one = client.read(&format!("often-{number}"));
        assert_same_bytes("one of many", &one, &file("small"));
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
    said.push(ask(&["--output", "none", &world.url("none")]));
    said.push(ask(&["--head", "--output", "head", &world.url("large")]));
    said
}

#[test]
fn curl_and_nginx() {
    in_every_mode(
        Least {
            connections: 12,
            bytes: 11 * LARGE,
            spliced: Spliced::AtLast,
        },
        |world| {
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
        },
    );
}

#[test]
fn wget_and_nginx() {
    in_every_mode(
        Least {
            connections: 5,
            bytes: 2 * LARGE,
            spliced: Spliced::AtLast,
        },
        |world| {
            let _nginx = nginx(&world.server);
            let urls: Vec<_> = FILES.iter().map(|(name, _)| world.url(name)).collect();
            let wget = ["wget", "--no-verbose", "--tries=1"];
            // On one connection, each file under its own name.
            let all: Vec<_> = urls.iter().map(String::as_str).collect();
            world.client.output(&[&wget[..], &all].concat());
            for (name, _) in FILES {
                assert_same_bytes(name, &world.client.read(name), &file(name));
                let to = world.url(&format!("put-{name}"));
                let method = ["--method=PUT", "--body-file", name, "--output-document=-"];
                world.client.output(&[&wget[..], &method, &[&to]].concat());
                let arrived = world.server.read(&format!("put-{name}"));
                assert_same_bytes(name, &arrived, &file(name));
            }
            let missing = world
                .client
                .run(&[&wget[..], &[&world.url("none")]].concat());
            missing.status.code()
        },
    );
}

#[test]
fn curl_and_pythons_http_server() {
    in_every_mode(
        Least {
            connections: 10,
            bytes: 11 * LARGE,
            spliced: Spliced::AtLast,
        },
        |world| {
            supply(&world.server);
            // A connection for each file, and one for several.
            ["HTTP/1.0", "HTTP/1.1"].map(|protocol| {
                let port = PORT.to_string();
                let line = [PYTHON, "-m", "http.server", "--protocol", protocol, &port];
                let _server = world.server.serve(PORT, &line);
                curl_gets(world)
            })
        },
    );
}

#[test]
fn node_and_node() {
    in_every_mode(
        Least {
            connections: 8,
            bytes: 16 * LARGE,
            spliced: Spliced::AtLast,
        },
        |world| {
            for host in [&world.client, &world.server] {
                supply(host);
                host.write("web.mjs", include_str!("../../fixtures/web.mjs"));
            }
            let (ip, port) = (world.ip().to_string(), PORT.to_string());
            let server = ["node", "web.mjs", "serve", &port];
            let _server = world.server.serve(PORT, &server);
            let ask = ["node", "web.mjs", "ask", &ip, &port];
            world
                .client
                .output(&[&ask[..], &FILES.map(|(name, _)| name)].concat())
        },
    );
}

#[test]
fn openjdks_client_and_nginx() {
    in_every_mode(
        Least {
            connections: 2,
            bytes: 14 * LARGE,
            spliced: Spliced::AtLast,
        },
        |world| {
            let _nginx = nginx(&world.server);
            let client = &world.client;
            supply(client);
            client.write("Fetch.java", include_str!("../../fixtures/Fetch.java"));
            let line = ["java", "Fetch.java", &world.url("")];
            let said = client.output(&[&line[..], &FILES.map(|(name, _)| name)].concat());
            for (name, _) in FILES {
                let arrived = world.server.read(&format!("put-{name}"));
                assert_same_bytes(name, &arrived, &file(name));
            }
            said
        },
    );
}
