use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use super::*;

fn said(counted: Counters) -> Said {
    Said {
        totals: Totals {
            pods: 2,
            counted,
            enrolled: 3,
            failed: 1,
            maps: vec![MapFill {
                map: "PODS",
                entries: 2,
                limit: 4096,
            }],
        },
        at: Instant::now(),
    }
}

fn page(counted: Counters) -> String {
    Metrics::new()
        .render(Shown {
            said: Some(said(counted)),
            pods: None,
            ready: true,
        })
        .expect("it can be written")
}

#[track_caller]
fn assert_has(page: &str, line: &str) {
    assert!(
        page.lines().any(|other| other == line),
        "no line {line}\n{page}"
    );
}

#[test]
fn connections_are_added_up_by_direction_and_verdict() {
    let mut counted = Counters::ZERO;
    counted.by_rule[Rule::OutIncludedCidr as usize] = 5;
    counted.by_rule[Rule::OutIncludedPort as usize] = 2;
    counted.by_rule[Rule::OutUid as usize] = 3;
    counted.by_rule[Rule::OutUidHairpin as usize] = 1;
    // These two share a number in the contract.
    counted.by_rule[Rule::InAll as usize] = 11;
    counted.by_rule[Rule::InExcludedPort as usize] = 13;
    // Counted where it leaves its socket.
    counted.by_rule[Rule::InInside as usize] = 17;
    counted.by_error[ErrorCode::ProxyAway as usize] = 4;
    let page = page(counted);
    for (direction, verdict, count) in [
        ("outbound", "outbound", 7),
        ("outbound", "direct", 3),
        ("outbound", "inbound", 1),
        ("outbound", "dns", 0),
        ("inbound", "inbound", 11),
        ("inbound", "direct", 13),
        ("inbound", "outbound", 0),
    ] {
        assert_has(
            &page,
            &format!(
                "shunt_connections_total{{direction=\"{direction}\",verdict=\"{verdict}\"}} {count}"
            ),
        );
    }
    assert_has(
        &page,
        "shunt_proxy_away_refusals_total{direction=\"inbound\"} 4",
    );
    assert_has(
        &page,
        "shunt_connection_errors_total{reason=\"proxy_away\"} 4",
    );
    assert_has(&page, "shunt_map_limit_entries{map=\"PODS\"} 4096");
    assert_has(&page, "shunt_enrolments_total{outcome=\"failed\"} 1");
    assert_has(&page, "shunt_ready 1");
}

#[test]
fn what_others_tell_is_counted() {
    let metrics = Metrics::new();
    metrics.cni_add(Duration::from_millis(30), CniAdd::Enrolled);
    metrics.cni_add(Duration::from_secs(2), CniAdd::Failed);
    let pods = Arc::new(PodsState::default());
    pods.errors.fetch.inc();
    let shown = Shown {
        pods: Some(pods),
        ..Shown::default()
    };
    let page = metrics.render(shown).expect("it can be written");
    assert_has(&page, "shunt_kubernetes_errors_total{reason=\"fetch\"} 1");
    assert_has(&page, "shunt_kubernetes_watch_lag_seconds 0.0");
    assert_has(
        &page,
        "shunt_cni_add_duration_seconds_bucket{le=\"0.05\",outcome=\"enrolled\"} 1",
    );
    assert_has(
        &page,
        "shunt_cni_add_duration_seconds_count{outcome=\"failed\"} 1",
    );
    assert_has(
        &page,
        "shunt_cni_add_duration_seconds_count{outcome=\"not_wanted\"} 0",
    );
    assert_has(&page, "shunt_ready 0");
    assert!(
        !page.contains("shunt_pods_enrolled"),
        "nobody has said that"
    );
}

/// A metric as the page declares it: its type and its help.
type Declared = BTreeMap<String, (String, String)>;

/// What the page declares, by the names of series without the suffixes of histograms.
fn declared() -> Declared {
    let page = page(Counters::ZERO);
    let mut helps = BTreeMap::new();
    let mut declared = Declared::new();
    for line in page.lines() {
        if let Some((name, help)) = line
            .strip_prefix("# HELP ")
            .and_then(|rest| rest.split_once(' '))
        {
            helps.insert(name, help);
        }
        if let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|rest| rest.split_once(' '))
        {
            let suffix = match kind {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            let help = helps.get(name).copied().unwrap_or_default();
            declared.insert(
                format!("{name}{suffix}"),
                (kind.to_owned(), help.to_owned()),
            );
        }
    }
    declared
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(repository(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn names_follow_the_custom() {
    for (name, (kind, help)) in declared() {
        assert!(name.starts_with("shunt_"), "{name}");
        assert!(!help.is_empty(), "{name} has no help");
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
        for unit in ["milliseconds", "_ms", "kilobytes", "minutes"] {
            assert!(!name.contains(unit), "{name} is not in a base unit");
        }
    }
}

/// The documentation has a row for each metric, with its type, and no other.
#[test]
fn every_metric_is_documented_and_every_documented_one_exists() {
    let documented: BTreeMap<String, String> = read("docs/metrics.md")
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `shunt_")?.split('|');
            let name = cells.next()?.trim().trim_end_matches('`');
            Some((format!("shunt_{name}"), cells.next()?.trim().to_owned()))
        })
        .collect();
    let declared: BTreeMap<String, String> = declared()
        .into_iter()
        .map(|(name, (kind, _))| (name, kind))
        .collect();
    assert_eq!(documented, declared);
}

/// The documentation names every value that a label takes.
#[test]
fn every_value_of_a_label_is_documented() {
    let text = read("docs/metrics.md");
    let page = page(Counters::ZERO);
    let labels = page.lines().filter_map(|line| {
        let (_, rest) = line.split_once('{')?;
        rest.split_once('}').map(|(labels, _)| labels)
    });
    let mut values = BTreeSet::new();
    for label in labels.flat_map(|labels| labels.split(',')) {
        let (name, value) = label.split_once('=').expect("a label has a value");
        if !matches!(name, "le" | "version" | "map") {
            values.insert(value.trim_matches('"').to_owned());
        }
    }
    for value in values {
        assert!(
            text.contains(&format!("`{value}`")),
            "docs/metrics.md does not name {value}"
        );
    }
}

/// The words of a text that are names of series of the agent.
fn named(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("shunt_"))
        .map(str::to_owned)
        .collect()
}

/// Dashboard and alerts ask for nothing that is not there.
#[test]
fn what_dashboard_and_alerts_ask_for_exists() {
    let declared = declared();
    let exists = |name: &str| {
        let histogram = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .is_some_and(|family| {
                declared
                    .get(family)
                    .is_some_and(|(kind, _)| kind == "histogram")
            });
        declared.contains_key(name) || histogram
    };
    for file in ["deploy/dashboards/shunt.json", "deploy/alerts/shunt.yaml"] {
        let names = named(&read(file));
        assert!(names.len() > 5, "{file} asks for next to nothing");
        for name in names {
            assert!(exists(&name), "{file} asks for {name}, which is no metric");
        }
    }
}

#[test]
fn the_dashboard_is_json_whose_panels_do_not_overlap() {
    let dashboard: serde_json::Value =
        serde_json::from_str(&read("deploy/dashboards/shunt.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut cells = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64()), "an id twice: {panel}");
        let side = |name: &str| panel["gridPos"][name].as_u64().expect("a number");
        for x in side("x")..side("x") + side("w") {
            assert!(x < 24, "wider than the dashboard: {panel}");
            for y in side("y")..side("y") + side("h") {
                assert!(cells.insert((x, y)), "two panels at {x}, {y}");
            }
        }
    }
}

/// Whoever gets an alert finds what it means.
#[test]
fn every_alert_is_documented_and_every_documented_one_exists() {
    let alerts = read("deploy/alerts/shunt.yaml");
    let alerts = alerts.lines().filter_map(|line| {
        let (_, name) = line.split_once("- alert: ")?;
        Some(name.trim().to_owned())
    });
    let text = read("docs/metrics.md");
    let documented = text.lines().filter_map(|line| {
        let (name, _) = line.strip_prefix("| Shunt")?.split_once(' ')?;
        Some(format!("Shunt{name}"))
    });
    let documented: BTreeSet<String> = documented.collect();
    assert!(!documented.is_empty());
    assert_eq!(documented, alerts.collect());
}
