//! Options of `palisade observe`. The filters are those of [`palisade_flowlog::filter::FLAGS`]. Names of options are
//! those of Hubble's command line.

use std::{io::IsTerminal as _, path::PathBuf, time::SystemTime};

use super::server::ServerArgs;
use clap::{
    Arg, ArgAction, ArgMatches, Args, ColorChoice, FromArgMatches, builder::BoolishValueParser, value_parser,
};
use jiff::tz::TimeZone;
use palisade_flowlog::{
    FieldMask, FilterBuilder, Filters, TimeFormat, Timestamp,
    filter::{ApiFilters, FLAGS},
    format::{Format, Printer},
};

/// Text after the options in `--help`.
pub(super) const OBSERVE_HELP: &str = "\
Examples:
  palisade observe                                          the last 20 flows
  palisade observe --follow --verdict dropped               what is dropped, as it happens
  palisade observe --since 5m --to-port 443 --not --from-ip 10.0.0.0/8
  palisade observe --since 'Apr 28 03:04:16.656'            from a line of an earlier output on
  palisade observe --first 10 --label app=web -o table
  palisade observe --pod shop/web --protocol dns            what web asks, and the answers
  palisade observe --verdict dropped --rules                with the rule that denied, and its place in a file
  palisade observe --all -o json > flows.json               save flows;
  palisade observe --input-file flows.json --verdict audit  read them later, without a daemon
  palisade observe --last 100 -o json --field-mask time,source.pod_name,verdict
  palisade observe --server tls://node2:4244 --tls-ca-cert-files ca.crt --follow     flows of another node
  palisade observe --uuid 8a3c5e10-7f2b-8c41-9000-00000000002a -o dict --rules

Values of one option are alternatives; different options must all match. An option for either end, such as --pod or
--port, matches the source or the destination, and all options of this kind must match at the same end. Options after
--not together hide the flows that match all of them. Lists have commas: --to-port 80,443.

Times are in local time; --utc prints and reads them in UTC. In JSON they are always in UTC.
--server asks a server of the flow API: a node of Palisade or Cilium, or a relay (docs/HUBBLE.md). It knows the filters of
that API, and its flows have no rules and files of Palisade. Agent events: `palisade monitor --type agent`.
--input-file reads what `palisade observe -o json`, `hubble observe -o jsonpb` and the exporters write, one flow per line,
in the order of the file.";

/// Options of `palisade observe`.
#[derive(Clone, Debug, Default)]
pub(crate) struct ObserveArgs {
    /// Filters and range of times.
    pub query: ApiFilters,
    /// Time of the command line, which relative times refer to.
    pub now: Timestamp,
    /// Whether to continue with flows that arrive later.
    pub follow: bool,
    /// Number of most recent flows to show.
    pub last: Option<usize>,
    /// Number of oldest flows to show.
    pub first: Option<usize>,
    /// Whether to show all flows in the ring.
    pub all: bool,
    /// File with flows, in place of the daemon; `-` for the standard input.
    pub input_file: Option<PathBuf>,
    /// Server of the flow API, in place of the daemon.
    pub server: ServerArgs,
    /// Whether to print the filters only.
    pub print_raw_filters: bool,
    /// Whether to print no warnings.
    pub silent: bool,
    /// Printer of the chosen format.
    pub printer: Printer,
}

/// The filters of `palisade observe`, for other commands about flows.
#[derive(Clone, Debug, Default)]
pub(crate) struct FilterArgs {
    /// Filters and range of times.
    pub query: ApiFilters,
}

impl FilterArgs {
    /// Returns whether no filter was given.
    pub(crate) fn is_empty(&self) -> bool {
        self.query == ApiFilters::default()
    }
}

impl FromArgMatches for FilterArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let now = Timestamp::from_system_time(SystemTime::now());
        let query = query(&given_filters(matches), now, TimeZone::system())?;
        Ok(Self { query })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for FilterArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        command.args(filter_args())
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// Returns the filters of a command line: their places, options and values, in the order of the command line.
fn given_filters(matches: &ArgMatches) -> Vec<(usize, String, String)> {
    let mut filters = Vec::new();
    for flag in FLAGS {
        let values = matches.get_many::<String>(flag.name).into_iter().flatten();
        let places = matches.indices_of(flag.name).into_iter().flatten();
        filters.extend(
            places
                .zip(values)
                .map(|(place, value)| (place, flag.name.to_owned(), value.clone())),
        );
    }
    filters.sort();
    filters
}

/// Returns the filters in the form of the flow API.
fn query(
    filters: &[(usize, String, String)],
    now: Timestamp,
    zone: TimeZone,
) -> Result<ApiFilters, clap::Error> {
    let mut builder = FilterBuilder::new(now).in_zone(zone);
    filters
        .iter()
        .try_for_each(|(_, flag, value)| builder.flag(flag, value))
        .and_then(|()| builder.finish_api())
        // The filters are compiled by the daemon too. Here errors are found without a daemon.
        .and_then(|query| Filters::compile(&query).map(|_| query))
        .map_err(|error| clap::Error::raw(clap::error::ErrorKind::ValueValidation, error.to_string()))
}

impl FromArgMatches for ObserveArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let filters = given_filters(matches);
        let format = match matches.get_one::<String>("output").map(String::as_str) {
            Some("dict") => Format::Dict,
            Some("table" | "tab") => Format::Table,
            Some("json" | "jsonpb" | "JSON") => Format::Json,
            _ => Format::Compact,
        };
        let colour = match matches.get_one::<ColorChoice>("color") {
            Some(ColorChoice::Always) => true,
            Some(ColorChoice::Never) => false,
            _ => std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        };
        let mut mask = FieldMask::default();
        for paths in matches.get_many::<String>("field-mask").into_iter().flatten() {
            mask.add_list(paths).map_err(|error| {
                clap::Error::raw(
                    clap::error::ErrorKind::ValueValidation,
                    format!("--field-mask: {error}"),
                )
            })?;
        }
        let refuse = |why: &str| Err(clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, why));
        if !mask.is_empty() && format != Format::Json {
            return refuse("--field-mask applies to JSON only: add -o json");
        }
        let server = ServerArgs::from_arg_matches(matches)?;
        if server.server.is_some() && matches.contains_id("input-file") {
            return refuse("--server and --input-file cannot be combined: flows come from one of them");
        }
        let follow = matches.get_flag("follow");
        if follow && format == Format::Table {
            return refuse(
                "-o table cannot follow flows, since the widths of its columns depend on all of them: use -o compact",
            );
        }
        if follow && filters.iter().any(|(_, flag, _)| flag == "until") {
            return refuse("--follow and --until cannot be combined");
        }
        let zone = if matches.get_flag("utc") {
            TimeZone::UTC
        } else {
            TimeZone::system()
        };
        let now = Timestamp::from_system_time(SystemTime::now());
        let query = query(&filters, now, zone.clone())?;
        let translate = matches.get_one("ip-translation").copied().unwrap_or(true);
        Ok(Self {
            query,
            now,
            follow,
            last: matches.get_one("last").copied(),
            first: matches.get_one("first").copied(),
            all: matches.get_flag("all"),
            input_file: matches.get_one("input-file").cloned(),
            server,
            print_raw_filters: matches.get_flag("print-raw-filters"),
            silent: matches.get_flag("silent-errors"),
            printer: Printer {
                format,
                colour: colour && matches!(format, Format::Compact | Format::Dict),
                node: matches.get_flag("print-node-name"),
                rules: matches.get_flag("rules"),
                policy_names: matches.get_flag("print-policy-names"),
                numeric: matches.get_flag("numeric") || !translate,
                time: matches.get_one("time-format").copied().unwrap_or_default(),
                zone,
                mask,
            },
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for ObserveArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let args = selection().into_iter().chain(formatting()).chain(of_hubble());
        ServerArgs::augment_args(command.args(args)).args(filter_args())
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// Returns the options that are filters.
fn filter_args() -> impl Iterator<Item = Arg> {
    FLAGS.iter().map(|flag| {
        let mut arg = Arg::new(flag.name)
            .long(flag.name)
            .help(flag.help)
            .help_heading("Filters")
            .action(ArgAction::Append);
        if let Some(short) = flag.short {
            arg = arg.short(short);
        }
        if flag.value.is_empty() {
            arg.num_args(0).default_missing_value("")
        } else {
            arg.value_name(flag.value)
        }
    })
}

fn switch(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).help(help).action(ArgAction::SetTrue)
}

/// Returns the options that choose flows by their number and source.
fn selection() -> Vec<Arg> {
    let count = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name("COUNT")
            .value_parser(parse_count)
            .help(help)
    };
    vec![
        switch(
            "follow",
            "Continue with flows as they arrive, also after a restart of the daemon",
        )
        .short('f')
        .conflicts_with_all(["first", "input-file"]),
        count(
            "last",
            "The last COUNT flows that pass the filters [default: 20; 0 with --follow; all with --since, --until or \
             --input-file]",
        ),
        count("first", "The oldest COUNT flows that pass the filters").conflicts_with("last"),
        switch("all", "All flows that the daemon still has").conflicts_with_all(["last", "first"]),
        Arg::new("input-file")
            .long("input-file")
            .value_name("FILE")
            .value_parser(value_parser!(PathBuf))
            .help("Read flows from a file of JSON lines in place of the daemon; - for the standard input"),
        switch(
            "print-raw-filters",
            "Print the filters as --allowlist and --denylist accept them, and no flows",
        ),
        switch(
            "silent-errors",
            "Print no warnings about lost flows, unreadable lines and the connection",
        )
        .short('s'),
    ]
}

/// Returns the options for the output.
fn formatting() -> Vec<Arg> {
    let formats = ["compact", "dict", "table", "tab", "json", "jsonpb", "JSON"];
    let formats = formats.map(|name| {
        let alias = matches!(name, "tab" | "JSON");
        clap::builder::PossibleValue::new(name).hide(alias)
    });
    vec![
        Arg::new("output")
            .short('o')
            .long("output")
            .value_name("FORMAT")
            .value_parser(formats)
            .default_value("compact")
            .help("Output format: lines, blocks of KEY: value, columns, or a JSON object per line (jsonpb is the same)"),
        Arg::new("time-format")
            .long("time-format")
            .value_name("FORMAT")
            .value_parser(parse_time_format)
            .default_value("StampMilli")
            .help("Format of times: StampMilli (Apr 28 03:04:16.656), YearMonthDay, YearMonthDayHour, \
                   YearMonthDayHourMinute, RFC3339, RFC3339Milli, RFC3339Micro, RFC3339Nano or RFC1123Z"),
        switch("utc", "Print times, and read those of --since and --until, in UTC; otherwise in local time"),
        Arg::new("color")
            .long("color")
            .value_name("WHEN")
            .value_parser(value_parser!(ColorChoice))
            .default_value("auto")
            .help("Use colours in compact and dict; auto: if the output is a terminal and NO_COLOR is not set"),
        switch("print-node-name", "Print the name of the node"),
        switch(
            "print-policy-names",
            "Print the names of the policies after ALLOWED and DENIED",
        ),
        switch("rules", "Print the deciding rule and its place in a file"),
        switch("numeric", "Print addresses only, no names"),
        Arg::new("ip-translation")
            .long("ip-translation")
            .value_name("BOOL")
            .value_parser(BoolishValueParser::new())
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .help("Print names in place of addresses [default: true]; false is the same as --numeric"),
        Arg::new("field-mask")
            .long("field-mask")
            .visible_alias("experimental-field-mask")
            .value_name("FIELDS")
            .action(ArgAction::Append)
            .help("Print only these fields of flows with -o json (time,source.pod_name,verdict)"),
    ]
}

/// Options of Hubble's command line for its way to a server that [`ServerArgs`] does not have.
const SERVER_OPTIONS: [&str; 9] = [
    "tls-allow-insecure",
    "timeout",
    "request-timeout",
    "basic-auth-username",
    "basic-auth-password",
    "port-forward",
    "port-forward-port",
    "kube-context",
    "kubeconfig",
];

/// Returns what Hubble's command line has and `palisade observe` does not need. It is not in `--help`: each part is accepted
/// without effect, or its error says what to use instead.
fn of_hubble() -> impl Iterator<Item = Arg> {
    let server = SERVER_OPTIONS.iter().map(|name| {
        let arg = Arg::new(*name)
            .long(*name)
            .num_args(0..=1)
            .default_missing_value("");
        let arg = if *name == "port-forward" {
            arg.short('P').alias("auto-port-forward")
        } else {
            arg
        };
        arg.value_parser(refuse_server)
    });
    let others = [
        // Text output does not depend on which fields are requested.
        switch("use-default-field-masks", "").alias("experimental-use-default-field-masks"),
        Arg::new("what").index(1).value_parser(parse_what),
    ];
    server.chain(others).map(|arg| arg.hide(true))
}

fn refuse_server(_: &str) -> Result<String, String> {
    Err(
        "palisade observe has no such way to a server: `--server HOST:PORT` names one, and `--tls-ca-cert-files` the CA of its \
         certificate (docs/HUBBLE.md)"
            .to_owned(),
    )
}

/// Parses the name of a subcommand of `hubble observe`.
fn parse_what(text: &str) -> Result<String, String> {
    Err(match text {
        "flows" => return Ok(text.to_owned()),
        "agent-events" => "`palisade monitor --type agent` shows agent events".to_owned(),
        "debug-events" => {
            "the programs have no debug events; `palisade log set` shows the steps of inspection in the log"
                .to_owned()
        }
        _ => "palisade observe has options only; `palisade observe --help` lists them".to_owned(),
    })
}

fn parse_count(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| {
        "not a number of flows, such as 100; for flows of a time use --since, for all use --all".to_owned()
    })
}

fn parse_time_format(text: &str) -> Result<TimeFormat, String> {
    text.parse().map_err(|_| {
        let names: Vec<_> = TimeFormat::names().collect();
        format!("none of {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn observe(args: &[&str]) -> Result<ObserveArgs, clap::Error> {
        let all = ["palisade", "observe"].iter().chain(args);
        let Command::Observe(args) = Cli::try_parse_from(all)?.command else {
            panic!("another command");
        };
        Ok(args)
    }

    #[test]
    fn filters_keep_their_order() {
        let args = observe(&[
            "--not",
            "--to-port",
            "80",
            "-f",
            "--from-ip",
            "10.0.0.1",
            "--not",
            "--to-port=443",
        ])
        .unwrap();
        let filters = serde_json::to_string(&args.query).unwrap();
        assert_eq!(
            filters,
            r#"{"allowlist":[{"source_ip":["10.0.0.1"]}],"denylist":[{"destination_port":["80","443"]}]}"#
        );
        assert!(args.follow);
    }

    #[test]
    fn other_commands_about_flows_take_the_same_filters() {
        use crate::cli::PolicyCommand;
        let filters = ["--verdict", "audit", "--not", "--to-port", "53"];
        let wanted = observe(&filters).unwrap().query;
        let suggest = Cli::try_parse_from(["palisade", "policy", "suggest"].iter().chain(&filters)).unwrap();
        let Command::Policy(PolicyCommand::Suggest(args)) = suggest.command else {
            panic!("another command");
        };
        assert_eq!(args.filters.query, wanted);
        let test = ["palisade", "policy", "test", "--flows", "f", "--policies", "p"];
        let test = Cli::try_parse_from(test.iter().chain(&filters)).unwrap();
        let Command::Policy(PolicyCommand::Test { filters, .. }) = test.command else {
            panic!("another command");
        };
        assert_eq!(filters.query, wanted);
        assert!(Cli::try_parse_from(["palisade", "policy", "suggest", "--verdict", "x"]).is_err());
    }

    #[test]
    fn wrong_flags_of_observe_are_refused() {
        assert!(
            observe(&["--to-prt", "80"])
                .unwrap_err()
                .to_string()
                .contains("--to-port")
        );
        assert!(observe(&["--last", "x"]).is_err());
        assert!(observe(&["-o", "xml"]).is_err());
    }

    #[test]
    fn options_of_hubble_are_accepted() {
        let args = observe(&[
            "-4",
            "-n",
            "shop",
            "--first",
            "5",
            "--ip-translation=false",
            "--print-policy-names",
            "--time-format",
            "rfc3339milli",
            "-o",
            "tab",
            "-s",
        ])
        .unwrap();
        assert_eq!(args.first, Some(5));
        assert!(args.printer.numeric && args.printer.policy_names && args.silent);
        assert_eq!(args.printer.time, TimeFormat::Rfc3339Milli);
        assert_eq!(args.printer.format, Format::Table);
        assert_eq!(args.query.allowlist.len(), 2);
        let args = observe(&[
            "-A",
            "--ip-translation",
            "-o",
            "JSON",
            "--field-mask",
            "time,verdict",
        ])
        .unwrap();
        assert!(!args.printer.numeric && !args.printer.mask.is_empty());
    }

    #[test]
    fn parts_of_hubble_without_a_meaning_are_accepted_or_refused_with_what_to_use() {
        let args = observe(&["flows", "--use-default-field-masks", "--last", "3"]).unwrap();
        assert_eq!(args.last, Some(3));
        let args = observe(&["--server", "a:1", "--tls", "--tls-ca-cert-files", "a,b"]).unwrap();
        assert!(args.server.tls && args.server.tls_ca_cert_files.len() == 2);
        for (args, hint) in [
            (&["-P"][..], "--server HOST:PORT"),
            (&["--port-forward", "--last", "1"], "--server HOST:PORT"),
            (
                &["--server", "a:1", "--tls-allow-insecure"],
                "--tls-ca-cert-files",
            ),
            (&["--tls"], "--server"),
            (&["--server", "a:1", "--input-file", "-"], "--input-file"),
            (&["agent-events"], "palisade monitor --type agent"),
            (&["debug-events"], "palisade log set"),
            (&["web"], "--help"),
            (&["--ip-trace-option", "136"], "IP options"),
            (&["--ip-trace-id", "1"], "IP options"),
        ] {
            let error = observe(args).unwrap_err().to_string();
            assert!(error.contains(hint), "{args:?}: {error}");
        }
        let help = <Cli as clap::CommandFactory>::command()
            .find_subcommand_mut("observe")
            .unwrap()
            .render_long_help()
            .to_string();
        assert!(
            !help.contains("--port-forward") && !help.contains("default-field-masks"),
            "{help}"
        );
    }

    #[test]
    fn options_that_exclude_each_other_are_refused() {
        for (args, hint) in [
            (&["--first", "1", "--last", "1"][..], "--first"),
            (&["--first", "1", "--all"], "--first"),
            (&["--first", "1", "--follow"], "--first"),
            (&["--last", "1", "--all"], "--last"),
            (&["--follow", "-o", "table"], "-o compact"),
            (&["--follow", "--until", "1m"], "--until"),
            (&["--follow", "--input-file", "x"], "--input-file"),
            (&["--field-mask", "time"], "-o json"),
            (&["--field-mask", "tim", "-o", "json"], "known here: time"),
            (&["--last", "all"], "--all"),
            (&["-n", "shop", "--from-pod", "web"], "--from-pod"),
            (&["-n", "shop", "--pod", "home/web"], "another namespace"),
            (&["--verdict", "nonsense"], "DROPPED"),
            (&["--service", "web"], "Kubernetes"),
            (&["--verdict", "dropped", "--not"], "--not"),
            (&["--time-format", "ISO"], "RFC3339"),
        ] {
            let error = observe(args).unwrap_err().to_string();
            assert!(error.contains(hint), "{args:?}: {error}");
        }
    }
}
