//! The real rules.

use crate::{
    Netns, Owner,
    command::{output_of, output_with_input},
};

/// Loads `rules`, in the language of `iptables-restore`, into a namespace.
///
/// # Panics
///
/// When the kernel or the tool refuses them.
pub fn restore(netns: &Netns, rules: &str) {
    restore_with("iptables-restore", netns, rules);
}

/// The same with one of the tool's variants, such as `iptables-legacy-restore`.
///
/// # Panics
///
/// As [`restore`].
pub fn restore_with(tool: &str, netns: &Netns, rules: &str) {
    output_with_input(&mut netns.command(tool, Owner::ROOT), rules);
}

/// Loads rules in the language of `nft` into a namespace.
///
/// # Panics
///
/// As [`restore`].
pub fn load_nft(netns: &Netns, rules: &str) {
    output_with_input(netns.command("nft", Owner::ROOT).args(["-f", "-"]), rules);
}

/// The same in the language of `ip6tables-restore`.
///
/// # Panics
///
/// As [`restore`].
pub fn restore6(netns: &Netns, rules: &str) {
    output_with_input(&mut netns.command("ip6tables-restore", Owner::ROOT), rules);
}

/// Takes the rules of both families away again, and what connection tracking
/// remembers of them.
///
/// # Panics
///
/// When the kernel or a tool refuses.
pub fn forget(netns: &Netns) {
    const NO_RULES: &str = "*nat\nCOMMIT\n*mangle\nCOMMIT\n";
    restore(netns, NO_RULES);
    restore6(netns, NO_RULES);
    output_of(netns.command("conntrack", Owner::ROOT).arg("-F"));
}

/// Every rule of a namespace (lines that append to a chain), as
/// `iptables-save` prints it.
///
/// # Panics
///
/// When the tool fails.
pub fn rules(netns: &Netns) -> Vec<String> {
    output_of(&mut netns.command("iptables-save", Owner::ROOT))
        .lines()
        .filter(|line| line.starts_with("-A"))
        .map(str::to_owned)
        .collect()
}

/// A file of rules together with the settings that mean the same.
#[derive(Clone, Copy, Debug)]
pub struct RuleSet {
    /// Its name, for messages.
    pub name: &'static str,
    /// The file.
    pub text: &'static str,
}

impl RuleSet {
    /// The flags of `istio-iptables` on the line `# settings:`.
    ///
    /// # Panics
    ///
    /// When there is no such line.
    pub fn settings(&self) -> Vec<&'static str> {
        self.text
            .lines()
            .find_map(|line| line.strip_prefix("# settings:"))
            .unwrap_or_else(|| panic!("{}: no line `# settings:`", self.name))
            .split_whitespace()
            .collect()
    }
}
