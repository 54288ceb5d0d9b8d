//! `palisade log`.

use std::{net::IpAddr, time::Duration};

use clap::Subcommand;
use palisade_flowlog::duration;

use super::output::OutputArgs;

/// `palisade log`.
#[derive(Debug, Subcommand)]
pub(crate) enum LogCommand {
    /// Set levels of the daemon's log for a limited time.
    #[command(after_help = "Examples:
  palisade log set inspect=debug --endpoint default/frontend
  palisade log set inspect=trace --address 192.0.2.7 --for 1m
  palisade log set policy=debug,fqdn=trace --for 1h

With inspect=debug, the daemon logs each step of the inspection of a connection: what was read, each rule that was
compared and why it does not match, the verdict, what the proxy does, what is forwarded without inspection. Steps are
limited to 500 per second; secrets are redacted as in flows. The levels replace those of an earlier `log set`, and end
with the daemon. `palisade log get` lists the components.")]
    Set {
        /// COMPONENT=LEVEL; levels are off, error, warn, info, debug and trace.
        #[arg(required = true, value_name = "COMPONENT=LEVEL", value_delimiter = ',', value_parser = parse_level)]
        levels: Vec<(String, String)>,
        /// Only connections of this endpoint: number, name or address (for inspect).
        #[arg(long, value_name = "ENDPOINT")]
        endpoint: Option<String>,
        /// Only connections with this address as client or server (for inspect).
        #[arg(long, value_name = "ADDRESS")]
        address: Option<IpAddr>,
        /// Time after which the log has its usual levels again, at most 24h.
        #[arg(long = "for", value_name = "DURATION", default_value = "10m", value_parser = duration::parse)]
        time: Duration,
    },
    /// Show the level of each component, and the time that is left.
    Get {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// End the levels of `log set`.
    Reset,
}

fn parse_level(text: &str) -> Result<(String, String), String> {
    let (component, level) = text
        .split_once('=')
        .ok_or("write COMPONENT=LEVEL, for example inspect=debug")?;
    Ok((component.to_owned(), level.to_owned()))
}
