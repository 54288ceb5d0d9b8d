//! Options of `palisade monitor`. Names of options are those of `cilium monitor`.

use clap::ArgAction;

use super::OutputArgs;

/// Text after the options in `--help`.
pub(super) const HELP: &str = "\
Examples:
  palisade monitor --type drop
  palisade monitor --type drop,policy-verdict --related-to default/frontend
  palisade monitor --type drop -v --from default/frontend --to default/backend
  palisade monitor --type agent

The number after `flow` is the same for all packets of a flow, of both directions. Continues with the events of the next
daemon after a restart.";

/// Options of `palisade monitor`.
#[derive(Debug, clap::Args)]
pub(crate) struct MonitorArgs {
    /// Only events of these types: drop, policy-verdict, trace, l7 (requests and answers), agent (changes of policies,
    /// endpoints, the ipcache and learned names).
    #[arg(short = 't', long = "type", value_name = "TYPE", value_delimiter = ',', value_parser = parse_type)]
    pub types: Vec<MonitorType>,
    /// Only packets from these endpoints: numbers or names.
    #[arg(long, value_name = "ENDPOINT", value_delimiter = ',')]
    pub from: Vec<String>,
    /// Only packets to these endpoints.
    #[arg(long, value_name = "ENDPOINT", value_delimiter = ',')]
    pub to: Vec<String>,
    /// Only packets from or to these endpoints.
    #[arg(long, value_name = "ENDPOINT", value_delimiter = ',')]
    pub related_to: Vec<String>,
    /// Show drops and traces with length, headers and rule. Without effect on JSON.
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
    /// Print all identities as numbers, reserved ones (world) too. Addresses are printed without names in any case.
    /// Without effect on JSON.
    #[arg(short, long)]
    pub numeric: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Type of an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MonitorType {
    Drop,
    PolicyVerdict,
    Trace,
    L7,
    Agent,
}

impl MonitorType {
    /// Returns the value of the filter of flows; `None` for events that are not flows.
    pub(crate) const fn of_flows(self) -> Option<&'static str> {
        match self {
            Self::Drop => Some("drop"),
            Self::PolicyVerdict => Some("policy-verdict"),
            Self::Trace => Some("trace"),
            Self::L7 => Some("l7"),
            Self::Agent => None,
        }
    }
}

fn parse_type(text: &str) -> Result<MonitorType, String> {
    let instead = match text {
        "drop" => return Ok(MonitorType::Drop),
        "policy-verdict" => return Ok(MonitorType::PolicyVerdict),
        "trace" => return Ok(MonitorType::Trace),
        "l7" => return Ok(MonitorType::L7),
        "agent" => return Ok(MonitorType::Agent),
        "debug" => {
            "the programs have no debug messages; `palisade log set` shows the steps of inspection in the log. "
        }
        "capture" | "recorder" => "`palisade capture` writes packets to a file. ",
        "trace-sock" => "there are no programs at sockets. ",
        _ => "",
    };
    Err(format!(
        "{instead}The types are drop, policy-verdict, trace, l7 and agent"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_of_cilium_that_do_not_exist_name_what_does() {
        for (text, part) in [
            ("debug", "palisade log set"),
            ("capture", "palisade capture"),
            ("recorder", "palisade capture"),
            ("trace-sock", "sockets"),
            ("drops", "The types are drop, policy-verdict, trace, l7 and agent"),
        ] {
            let error = parse_type(text).unwrap_err();
            assert!(
                error.contains(part) && error.contains("The types are drop"),
                "{error}"
            );
        }
        assert_eq!(parse_type("agent"), Ok(MonitorType::Agent));
    }
}
