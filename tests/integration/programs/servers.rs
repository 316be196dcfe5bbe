//! Servers with protocols of their own, and the programs that try them out.

use shunt_tests::{Process, deadline::DEADLINE};

use super::{Host, Least, PORT, Spliced, World, in_every_mode};

const POSTGRESQL: &str = "/usr/lib/postgresql/15/bin";

fn redis_cli(world: &World, arguments: &[&str]) -> String {
    let (ip, port) = (world.ip().to_string(), PORT.to_string());
    let options = ["redis-cli", "-h", &ip, "-p", &port];
    world.client.output(&[&options, arguments].concat())
}

#[test]
fn redis_benchmark() {
    // The commands, their number, the connections, the bytes of each value, and
    // how many are sent before the first answer.
    const RUNS: [(&str, &str, &str, &str, &str); 4] = [
        ("set,get,incr,lpush,mset", "1000", "20", "64", "1"),
        ("set,get", "200", "8", "20000", "1"),
        ("set,get,lrange_100", "3000", "20", "64", "32"),
        ("set,get", "40", "2", "1000000", "4"),
    ];
    in_every_mode(
        Least {
            connections: 50,
            bytes: 100_000_000,
            spliced: Spliced::BothWays,
        },
        |world| {
            let port = PORT.to_string();
            let server = ["redis-server", "--port", &port, "--save", ""];
            let options = ["--protected-mode", "no"];
            let _redis = world.server.serve(PORT, &[&server[..], &options].concat());
            let ip = world.ip().to_string();
            for (tests, requests, clients, size, pipeline) in RUNS {
                let said = world.client.output(&[
                    "redis-benchmark",
                    "-q",
                    "-h",
                    &ip,
                    "-p",
                    &port,
                    "-t",
                    tests,
                    "-n",
                    requests,
                    "-c",
                    clients,
                    "-d",
                    size,
                    "-P",
                    pipeline,
                ]);
                assert!(!said.contains("rror"), "{said}");
            }
            let inserted: String = (0..20_000)
                .map(|i| format!("SET key:{i} {i}\r\n"))
                .collect();
            world.client.write("commands", inserted);
            let insert = format!("exec redis-cli -h {ip} -p {port} --pipe < commands");
            let piped = world.client.output(&["sh", "-c", &insert]);
            assert!(piped.contains("errors: 0, replies: 20000"), "{piped}");
            let mut calls: Vec<_> = redis_cli(world, &["INFO", "commandstats"])
                .lines()
                .filter_map(|line| line.split_once(",usec").map(|(calls, _)| calls.to_owned()))
                .collect();
            // It lists them in no order.
            calls.sort();
            let values = redis_cli(
                world,
                &["MGET", "key:1", "key:19999", "counter:__rand_int__"],
            );
            (calls, values, redis_cli(world, &["DBSIZE"]))
        },
    );
}

fn postgres(host: &Host) -> Process {
    let initdb = format!("{POSTGRESQL}/initdb");
    host.output(&[
        &initdb,
        "--pgdata=data",
        "--username=app",
        "--auth=trust",
        "--no-sync",
        "--no-locale",
        "--encoding=UTF8",
    ]);
    host.write("data/pg_hba.conf", "host all all all trust\n");
    let port = format!("--port={PORT}");
    let postgres = format!("{POSTGRESQL}/postgres");
    let process = host.start_program(&[
        &postgres,
        "-D",
        "data",
        &port,
        "--listen_addresses=*",
        "--unix_socket_directories=",
        "--fsync=off",
        "--autovacuum=off",
    ]);
    process.wait_for_line("database system is ready to accept connections", DEADLINE);
    process
}

#[test]
fn postgresql_and_pgbench() {
    in_every_mode(
        Least {
            connections: 12,
            bytes: 20_000_000,
            spliced: Spliced::BothWays,
        },
        |world| {
            let _postgres = postgres(&world.server);
            let target = format!("host={} port={PORT} user=app dbname=postgres", world.ip());
            let client = &world.client;
            let pgbench = |arguments: &[&str]| {
                let program = format!("{POSTGRESQL}/pgbench");
                client.output(&[&[program.as_str()], arguments, &[target.as_str()]].concat())
            };
            let psql = |query: &str| {
                let psql = format!("{POSTGRESQL}/psql");
                client.output(&[
                    &psql,
                    "--no-psqlrc",
                    "--tuples-only",
                    "--command",
                    query,
                    &target,
                ])
            };
            pgbench(&["--initialize", "--scale=1", "--quiet"]);
            let mut said = Vec::new();
            for protocol in ["simple", "extended", "prepared"] {
                let text = pgbench(&[
                    "--client=4",
                    "--jobs=2",
                    "--transactions=50",
                    "--no-vacuum",
                    "--random-seed=7",
                    "--protocol",
                    protocol,
                ]);
                let counted = text.lines().filter(|line| line.starts_with("number of "));
                said.extend(counted.map(str::to_owned));
            }
            said.push(psql(
                "SELECT count(*), sum(delta), sum(aid::bigint), sum(bid) FROM pgbench_history",
            ));
            said.push(psql("SELECT sum(abalance) FROM pgbench_accounts"));
            psql("\\copy pgbench_accounts TO 'accounts'");
            psql("CREATE TABLE again (LIKE pgbench_accounts)");
            psql("\\copy again FROM 'accounts'");
            said.push(psql(
                "SELECT count(*) FROM (TABLE again EXCEPT TABLE pgbench_accounts) AS different",
            ));
            said.push(psql(
                "SELECT md5(string_agg(again::text, ',' ORDER BY aid)) FROM again",
            ));
            said
        },
    );
}
