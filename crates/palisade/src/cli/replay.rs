//! Command line of `palisade replay`.

use std::{io::IsTerminal as _, net::IpAddr, path::PathBuf};

use clap::{Args, ColorChoice, ValueEnum};
use palisade_flowlog::format::{Format, Printer};

/// Text after the options of `palisade replay --help`.
pub(super) const HELP: &str = "Examples:
  palisade replay trace.pcap --policy policies.d --config palisade.toml
  palisade replay trace.pcapng --policy new.yaml --rules
  tcpdump -i eth0 -w - | palisade replay - --policy policies.d --summary
  palisade replay trace.pcap -o json > flows.json

Flows are written to the standard output, the summary to the standard error. docs/REPLAY.md says at which interface a
packet counts as seen, and what a capture cannot show. The exit code is 1 if the file is malformed; what was decided
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
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
    /// Write only the summary, to the standard output.
    #[arg(long)]
    pub summary: bool,
    /// Format of the flows, or of the summary.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: FlowOutput,
    /// With colours.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub color: ColorChoice,
    /// With the rule that decided, and where it is written.
    #[arg(long)]
    pub rules: bool,
    /// Addresses only, no names.
    #[arg(long)]
    pub numeric: bool,
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
