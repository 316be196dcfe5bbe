//! The text of a network configuration list, with the plugin in it and without.
//!
//! The text is other people's: it is cut and spliced at the places that matter, and every
//! other byte stays as it is. So what is put in can be taken out without a trace.

use std::{ops::Range, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};
use thiserror::Error;

use super::{TYPE, VERSIONS, version_numbers};

/// Why a file of the configuration directory is left alone.
#[derive(Debug, Error)]
pub enum ConflistError {
    /// It is no JSON, or not of the form.
    #[error(
        "is no CNI configuration ({0}), so it is left alone; write it as the CNI specification \
         says, or take it away"
    )]
    Malformed(#[from] serde_json::Error),
    /// Runtimes refuse it, too.
    #[error("has no plugin to chain to, so it is left alone")]
    Empty,
    /// Runtimes refuse it, too.
    #[error(
        "has no {0:?}, so it is left alone, and runtimes refuse it; is it a list? Then name it \
         *.conflist"
    )]
    Lacks(&'static str),
    /// Of a version without chains, or of one that is not known yet.
    #[error(
        "is of CNI {0:?}, so it is left alone: shunt-cni speaks {first} to {last}; give it \
         another cniVersion",
        first = VERSIONS[0],
        last = VERSIONS[VERSIONS.len() - 1]
    )]
    Version(String),
}

type Result<T> = std::result::Result<T, ConflistError>;

/// The plugin's entry in a list.
///
/// # Errors
///
/// When a path is not UTF-8, and so cannot stand in JSON.
pub fn entry(socket: &Path, kubelet_dir: &Path) -> Result<String> {
    let entry = OwnEntry {
        kind: TYPE,
        socket,
        kubelet_dir,
        capabilities: json!({ "io.kubernetes.cri.pod-annotations": true }),
    };
    Ok(serde_json::to_string(&entry)?)
}

/// What [`plugin`](super::plugin) reads.
#[derive(Serialize)]
struct OwnEntry<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    socket: &'a Path,
    #[serde(rename = "kubeletDir")]
    kubelet_dir: &'a Path,
    /// What the runtime is asked to pass.
    capabilities: Value,
}

/// A list with `entry` in it, at the end when it is new: another that is there already
/// keeps its place. `None` when it is there as it is.
///
/// # Errors
///
/// When the text is no list, or none that the plugin can serve.
pub fn with_entry(text: &str, entry: &str) -> Result<Option<String>> {
    let list: List = serde_json::from_str(text)?;
    check_version(&list.version, &list.versions)?;
    let plugins = Plugins::of(text, &list.plugins)?;
    let Some(&own) = plugins.own.first() else {
        return plugins.appended(text, entry).map(Some);
    };
    // Others may have written it another way.
    let is_same = is_same_json(list.plugins[own].get(), entry);
    if is_same && plugins.own.len() == 1 {
        return Ok(None);
    }
    let place = plugins.spans[own].clone();
    let others = plugins.own[1..].iter().map(|&index| plugins.cut(index));
    let mut edited = text.to_owned();
    for cut in others.rev() {
        edited.replace_range(cut, "");
    }
    edited.replace_range(place, entry);
    Ok(Some(edited))
}

/// A list without the plugin. `None` when it is not there.
///
/// # Errors
///
/// When the text is no list.
pub fn without_entry(text: &str) -> Result<Option<String>> {
    let mut edited = None;
    loop {
        let current = edited.as_deref().unwrap_or(text);
        let list: List = serde_json::from_str(current)?;
        let plugins = Plugins::of(current, &list.plugins)?;
        let Some(&own) = plugins.own.first() else {
            return Ok(edited);
        };
        let mut shorter = current.to_owned();
        shorter.replace_range(plugins.cut(own), "");
        edited = Some(shorter);
    }
}

/// The list that does what a single plugin's configuration does, and `entry` after it.
///
/// # Errors
///
/// When the text is no such configuration, or none that the plugin can serve.
pub fn listed(text: &str, entry: &str) -> Result<String> {
    let single: Single = serde_json::from_str(text)?;
    check_version(&single.version, &[])?;
    if single.kind.is_empty() {
        return Err(ConflistError::Lacks("type"));
    }
    if single.name.is_empty() {
        return Err(ConflistError::Lacks("name"));
    }
    Ok(format!(
        "{{\n  \"cniVersion\": {},\n  \"name\": {},\n  \"plugins\": [\n    {},\n    {entry}\n  ]\n}}\n",
        Value::from(single.version),
        Value::from(single.name),
        text.trim(),
    ))
}

/// A list, with its plugins as they are written.
#[derive(Deserialize)]
struct List<'a> {
    #[serde(default, rename = "cniVersion")]
    version: String,
    /// Since 1.1; the runtime takes the newest that it knows.
    #[serde(default, rename = "cniVersions")]
    versions: Vec<String>,
    #[serde(borrow)]
    plugins: Vec<&'a RawValue>,
}

/// A configuration of one plugin.
#[derive(Deserialize)]
struct Single {
    #[serde(default, rename = "cniVersion")]
    version: String,
    #[serde(default)]
    name: String,
    #[serde(default, rename = "type")]
    kind: String,
}

/// An entry of a list.
#[derive(Deserialize)]
struct Entry {
    #[serde(default, rename = "type")]
    kind: String,
}

/// Refuses what the plugin could not serve: then no pod of the node would start.
fn check_version(version: &str, versions: &[String]) -> Result<()> {
    let newest = versions
        .iter()
        .max_by_key(|version| version_numbers(version))
        .map_or(version, String::as_str);
    if VERSIONS.contains(&newest) {
        Ok(())
    } else {
        Err(ConflistError::Version(newest.to_owned()))
    }
}

fn is_same_json(one: &str, other: &str) -> bool {
    let values = [one, other].map(serde_json::from_str::<Value>);
    matches!(values, [Ok(one), Ok(other)] if one == other)
}

/// Where the plugins of a list are in its text, and which of them are this one.
struct Plugins {
    spans: Vec<Range<usize>>,
    own: Vec<usize>,
}

impl Plugins {
    /// `plugins` are parts of `text`.
    fn of(text: &str, plugins: &[&RawValue]) -> Result<Self> {
        let mut own = Vec::new();
        for (index, plugin) in plugins.iter().enumerate() {
            let Entry { kind } = serde_json::from_str(plugin.get())?;
            if kind == TYPE {
                own.push(index);
            }
        }
        let span = |plugin: &&RawValue| {
            let start = plugin.get().as_ptr().addr() - text.as_ptr().addr();
            start..start + plugin.get().len()
        };
        Ok(Self {
            spans: plugins.iter().map(span).collect(),
            own,
        })
    }

    /// `text` with one plugin more, written as the last of them is.
    fn appended(&self, text: &str, entry: &str) -> Result<String> {
        let last = self.spans.last().ok_or(ConflistError::Empty)?;
        let line = text[..last.start].rfind('\n').map(|newline| newline + 1);
        let indent = line.map(|start| &text[start..last.start]);
        let separator = match indent {
            Some(blanks) if blanks.trim().is_empty() => format!(",\n{blanks}"),
            Some(_) | None => ", ".to_owned(),
        };
        let mut longer = text.to_owned();
        longer.insert_str(last.end, &format!("{separator}{entry}"));
        Ok(longer)
    }

    /// What to cut for the plugin at `index` to be gone, and one comma with it.
    fn cut(&self, index: usize) -> Range<usize> {
        let own = &self.spans[index];
        match (index.checked_sub(1), self.spans.get(index + 1)) {
            (Some(before), _) => self.spans[before].end..own.end,
            (None, Some(after)) => own.start..after.start,
            (None, None) => own.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CALICO: &str = r#"{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "calico",
      "mtu": 0, "big": 123456789012345678901234567890, "float": 1.50,
      "ipam": { "type": "calico-ipam" }
    },
    {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}
  ],
  "extra": [1,   2]
}
"#;

    fn own() -> String {
        entry(
            Path::new("/run/shunt/shunt.sock"),
            Path::new("/var/lib/kubelet"),
        )
        .expect("UTF-8")
    }

    fn types(list: &str) -> Vec<String> {
        let list: Value = serde_json::from_str(list).expect("it is JSON");
        let plugins = list["plugins"].as_array().expect("it has plugins");
        let kind = |plugin: &Value| plugin["type"].as_str().unwrap_or_default().to_owned();
        plugins.iter().map(kind).collect()
    }

    #[test]
    fn the_entry_comes_last_and_the_rest_stays() {
        let added = with_entry(CALICO, &own()).expect("a list").expect("new");
        assert_eq!(types(&added), ["calico", "portmap", TYPE]);
        let expected = CALICO.replace(
            "{\"portMappings\": true}}\n",
            &format!("{{\"portMappings\": true}}}},\n    {}\n", own()),
        );
        assert_eq!(added, expected);
        assert_eq!(with_entry(&added, &own()).expect("a list"), None);
        let removed = without_entry(&added).expect("a list");
        assert_eq!(removed.as_deref(), Some(CALICO));
        assert_eq!(without_entry(CALICO).expect("a list"), None);
    }

    #[test]
    fn an_entry_in_other_words_is_the_same_and_another_is_replaced_in_its_place() {
        let added = with_entry(CALICO, &own()).expect("a list").expect("new");
        let value: Value = serde_json::from_str(&added).expect("it is JSON");
        let rewritten = serde_json::to_string_pretty(&value).expect("plain data");
        assert_eq!(with_entry(&rewritten, &own()).expect("a list"), None);

        let other = entry(Path::new("/run/b.sock"), Path::new("/k")).expect("UTF-8");
        let crowded = added.replace(&own(), &format!("{other},{{\"type\":\"x\"}}, {other}"));
        let tidied = with_entry(&crowded, &own())
            .expect("a list")
            .expect("not the same");
        assert_eq!(types(&tidied), ["calico", "portmap", TYPE, "x"]);
        assert!(tidied.contains(&own()) && !tidied.contains("/run/b.sock"));
    }

    #[test]
    fn an_entry_is_taken_out_of_any_place() {
        let list = |inside: &str| format!(r#"{{"cniVersion":"1.0.0","plugins":[{inside}]}}"#);
        let (a, b) = (r#"{"type":"a"}"#, r#"{"type":"b"}"#);
        let own = own();
        for (with, without) in [
            (format!("{own}, {a}"), a.to_owned()),
            (format!("{a},{own},{b}"), format!("{a},{b}")),
            (format!("{a} , {own} "), format!("{a} ")),
            (format!("{own}, {own},{b},{own}"), b.to_owned()),
            (format!(" {own} "), "  ".to_owned()),
        ] {
            let removed = without_entry(&list(&with)).expect("a list");
            assert_eq!(removed, Some(list(&without)));
        }
    }

    #[test]
    fn what_is_no_list_is_left_alone() {
        let version = |version: &str| CALICO.replace("\"0.3.1\"", version);
        for (text, says) in [
            (String::new(), "no CNI configuration"),
            ("not JSON".to_owned(), "no CNI configuration"),
            (format!("{CALICO}}}"), "no CNI configuration"),
            (r#"{"type": "bridge"}"#.to_owned(), "plugins"),
            (
                r#"{"cniVersion": "1.0.0", "plugins": ["x"]}"#.to_owned(),
                "no CNI configuration",
            ),
            (
                r#"{"cniVersion": "1.0.0", "plugins": []}"#.to_owned(),
                "no plugin",
            ),
            (version("\"0.2.0\""), "0.3.0 to 1.1.0"),
            (version("\"1.2.0\""), "0.3.0 to 1.1.0"),
            (version("\"one\""), "\"one\""),
            (version("\"\""), "cniVersion"),
            (
                version("\"1.0.0\", \"cniVersions\": [\"0.4.0\", \"1.10.0\"]"),
                "1.10.0",
            ),
        ] {
            let error = with_entry(&text, &own()).expect_err(&text).to_string();
            assert!(
                error.contains(says) && error.contains("left alone"),
                "{error}"
            );
        }
        let several = version("\"1.0.0\", \"cniVersions\": [\"0.1.0\", \"1.1.0\"]");
        assert!(with_entry(&several, &own()).is_ok());
    }

    #[test]
    fn a_single_plugin_becomes_a_list() {
        let single = r#"{"cniVersion": "0.4.0", "name": "n\"et", "type": "bridge", "a": 1.0}"#;
        let list = listed(&format!("\n {single}\n"), &own()).expect("a configuration");
        assert_eq!(types(&list), ["bridge", TYPE]);
        assert!(list.contains(single));
        let value: Value = serde_json::from_str(&list).expect("it is JSON");
        assert_eq!(value["name"], "n\"et");
        assert_eq!(with_entry(&list, &own()).expect("a list"), None);

        for (text, says) in [
            ("{}", "CNI \"\""),
            (CALICO, "*.conflist"),
            (r#"{"cniVersion": "0.4.0", "type": "bridge"}"#, "name"),
            ("7", "no CNI configuration"),
        ] {
            let error = listed(text, &own()).expect_err(text).to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    /// Any JSON.
    fn anything() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(any::<String>(), inner, 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    /// A list of plugins with fields of any kind, in one of three ways of writing.
    fn any_list() -> impl Strategy<Value = String> {
        let plugin = ("[a-z\u{e9}]{0,6}", anything())
            .prop_map(|(kind, extra)| json!({ "type": kind, "extra": extra, "mtu": 1500 }));
        let plugins = prop::collection::vec(plugin, 1..4);
        (plugins, anything(), 0..3).prop_map(|(plugins, extra, way)| {
            let list = json!({ "cniVersion": "1.0.0", "plugins": plugins, "extra": extra });
            let pretty = serde_json::to_string_pretty(&list).expect("plain data");
            match way {
                0 => list.to_string(),
                1 => pretty,
                // In strings a new line is written in another way.
                _ => pretty.replace('\n', "\r\n\t ") + "\n\n",
            }
        })
    }

    proptest! {
        #[test]
        fn adding_and_removing_leaves_every_byte(text in any_list()) {
            let added = with_entry(&text, &own()).expect("a list").expect("new");
            let before = types(&text);
            prop_assert_eq!(&types(&added)[..before.len()], &before[..]);
            prop_assert_eq!(with_entry(&added, &own()).expect("a list"), None);
            prop_assert_eq!(without_entry(&added).expect("a list"), Some(text));
        }

        #[test]
        fn no_text_is_too_strange(text in any::<String>()) {
            // An error, and no panic.
            let _ = (with_entry(&text, &own()), without_entry(&text), listed(&text, &own()));
        }
    }
}
