//! Command line of `palisade replay`.

use std::{io::IsTerminal as _, net::IpAddr, path::PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Args, ColorChoice, FromArgMatches, ValueEnum};
use palisade_flowlog::{
    filter::FLAGS,
    format::{Format, Printer},
};

/// Text after the options of `palisade replay --help`.
pub(super) const HELP: &str = "Examples:
  palisade replay trace.pcap --policy policies.d --config palisade.toml
  palisade replay trace.pcapng --policy new.yaml --verdict dropped --rules
  tcpdump -i eth0 -w - | palisade replay - --policy policies.d --summary
  palisade replay trace.pcap -o json > flows.json

Flows are written to the standard output, the summary to the standard error. docs/REPLAY.md says at which interface a
packet gets its verdict, and what a capture cannot show. The exit code is 1 if the file is malformed; what was decided
before the error is written.";

/// Format of the flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Default)]
pub(crate) enum FlowOutput {
    /// One line per flow.
    #[default]
    Compact,
    /// One block of lines per flow.
    Dict,
    /// One JSON object per line.
    Json,
    /// The same as json.
    Jsonpb,
}

/// Flags of `palisade replay`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ReplayArgs {
    /// Capture file (pcap or pcapng), or - for the standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Policy files, or folders of policy files [default: the folder of the configuration].
    #[arg(long = "policy", value_name = "PATH")]
    pub policies: Vec<PathBuf>,
    /// An address of the node, besides those of the configuration.
    #[arg(long = "node-address", value_name = "ADDRESS")]
    pub node_addresses: Vec<IpAddr>,
    /// Configured interface that the capture was made at, if the file does not name it.
    #[arg(long = "captured-at", value_name = "INTERFACE")]
    pub captured_at: Option<String>,
    /// Filters of the flows, as those of `observe`.
    #[command(flatten)]
    pub filters: FilterArgs,
    /// Write only the summary, to the standard output.
    #[arg(long)]
    pub summary: bool,
    /// Format of the flows, or of the summary.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: FlowOutput,
    /// Use colours; auto: if the output is a terminal and NO_COLOR is not set.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub color: ColorChoice,
    /// Print the deciding rule and its place in a file.
    #[arg(long)]
    pub rules: bool,
    /// Print addresses only, no names.
    #[arg(long)]
    pub numeric: bool,
}

/// Filters and their values, in the order of the command line: the flags of [`FLAGS`].
#[derive(Clone, Debug, Default)]
pub(crate) struct FilterArgs(pub Vec<(String, String)>);

impl FromArgMatches for FilterArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut filters = Vec::new();
        for flag in FLAGS {
            let values = matches.get_many::<String>(flag.name).into_iter().flatten();
            let places = matches.indices_of(flag.name).into_iter().flatten();
            let found = places.zip(values);
            filters.extend(found.map(|(place, value)| (place, flag.name.to_owned(), value.clone())));
        }
        filters.sort();
        let filters = filters.into_iter();
        Ok(Self(filters.map(|(_, flag, value)| (flag, value)).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for FilterArgs {
    fn augment_args(mut command: clap::Command) -> clap::Command {
        for flag in FLAGS {
            let mut arg = Arg::new(flag.name)
                .long(flag.name)
                .help(flag.help)
                .help_heading("Filters")
                .action(ArgAction::Append);
            if let Some(short) = flag.short {
                arg = arg.short(short);
            }
            arg = if flag.value.is_empty() {
                arg.num_args(0).default_missing_value("")
            } else {
                arg.value_name(flag.value)
            };
            command = command.arg(arg);
        }
        command
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl ReplayArgs {
    /// Returns the printer of the chosen format.
    pub(crate) fn printer(&self) -> Printer {
        Printer {
            format: match self.output {
                FlowOutput::Compact => Format::Compact,
                FlowOutput::Dict => Format::Dict,
                FlowOutput::Json | FlowOutput::Jsonpb => Format::Json,
            },
            colour: match self.color {
                ColorChoice::Always => true,
                ColorChoice::Never => false,
                ColorChoice::Auto => {
                    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
                }
            },
            rules: self.rules,
            numeric: self.numeric,
            ..Printer::default()
        }
    }
}
