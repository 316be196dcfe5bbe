//! `shunt explain` as a shell sees it.
#![expect(unused_crate_dependencies, reason = "the library uses them")]

use std::process::{Command, Output};

fn explain(args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shunt"))
        .arg("explain")
        .args(args)
        .env_clear()
        .envs(env.iter().copied())
        .output()
        .expect("the binary that was built for this test")
}

const QUESTION: [&str; 12] = [
    "--direction",
    "outbound",
    "--uid",
    "1000",
    "--gid",
    "1000",
    "--src",
    "10.1.1.5",
    "--dst",
    "10.9.9.9",
    "--port",
    "80",
];

#[test]
fn an_answer_is_written_to_stdout_with_exit_code_0() {
    let args = [&QUESTION[..], &["-i", "*", "-x", "", "--output", "json"]].concat();
    let output = explain(&args, &[("SHUNT_ENVOY_PORT", "4140")]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["port"], 4140);
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn bad_input_is_one_sentence_on_stderr_with_exit_code_2() {
    let args = [&QUESTION[..], &["-x", "*"]].concat();
    let output = explain(&args, &[]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(stderr.starts_with("shunt explain: -x *: "), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn a_missing_fact_is_a_usage_error_with_exit_code_2() {
    let output = explain(&QUESTION[..10], &[]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(stderr.contains("--port"), "{stderr}");
}
