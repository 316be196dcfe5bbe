use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::{Field, Inputs, Origin, Settings, SettingsError, Written};

/// The flags of istio-iptables (and shunt's own) as command-line arguments, to
/// be `#[command(flatten)]`ed into a subcommand. Made from the table of
/// [`Field`]s, and not looked at until [`settings`](Self::settings).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    given: Vec<(Field, String)>,
}

impl Flags {
    /// The settings that the flags and the environment ask for.
    ///
    /// `env` looks an environment variable up; see [`process_env`].
    ///
    /// # Errors
    ///
    /// The first value that does not mean anything.
    pub fn settings(
        &self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Settings, SettingsError> {
        Settings::parse(&self.inputs(env))
    }

    /// What the flags and the environment say. A flag beats shunt's own
    /// variable, which beats those of the mesh; an empty variable counts as
    /// unset, while an empty flag is an empty list.
    pub fn inputs(&self, env: &dyn Fn(&str) -> Option<String>) -> Inputs {
        let from_env = Field::ALL.iter().filter_map(|&field| {
            let own = field.shunt_env();
            let names = std::iter::once(own.as_str()).chain(field.mesh_env().iter().copied());
            names.into_iter().find_map(|name| {
                let text = env(name).filter(|text| !text.trim().is_empty())?;
                Some(Written {
                    field,
                    origin: Origin::Env(name.to_owned()),
                    text,
                })
            })
        });
        let mut inputs = Inputs::from_iter(from_env);
        inputs.extend(self.given.iter().map(|(field, text)| Written {
            field: *field,
            origin: Origin::Flag,
            text: text.clone(),
        }));
        inputs
    }
}

/// Looks `name` up in the environment of this process. Bytes that are not UTF-8
/// are replaced, so that they end up in an error and not in a setting.
pub fn process_env(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

impl Args for Flags {
    fn augment_args(command: Command) -> Command {
        Field::ALL
            .iter()
            .fold(command, |command, &field| command.arg(argument(field)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// One flag. The variables are named in the help text instead of by clap's
/// `env`: clap knows one variable for each flag, and reads it where no test
/// can reach.
fn argument(field: Field) -> Arg {
    let arg = Arg::new(field.long())
        .long(field.long())
        .help(help(field))
        .help_heading("Redirection settings")
        .value_name(field.value_name())
        .action(ArgAction::Set);
    let arg = match field.short() {
        Some(short) => arg.short(short),
        None => arg,
    };
    if field.is_switch() {
        arg.num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
    } else {
        arg
    }
}

fn help(field: Field) -> String {
    let mut text = field.help().trim().to_owned();
    text.push_str(" [env: ");
    text.push_str(&field.shunt_env());
    for name in field.mesh_env() {
        text.push_str(", ");
        text.push_str(name);
    }
    text.push(']');
    text
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.given = Field::ALL
            .iter()
            .filter_map(|&field| Some((field, matches.get_one::<String>(field.long())?.clone())))
            .collect();
        Ok(())
    }
}
