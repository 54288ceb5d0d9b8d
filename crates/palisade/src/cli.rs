//! The command line.

mod capture;
mod change;
mod json_path;
pub(crate) mod log;
mod monitor;
mod node;
mod observe;
mod output;
mod replay;
mod server;
pub(crate) mod top;

use std::{path::PathBuf, time::Duration};

use clap::{Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use palisade_flowlog::duration;

pub(crate) use self::capture::{CAPTURE_HELP, CaptureArgs};
pub(crate) use self::change::{ApplyArgs, ChangeArgs, DiffArgs, RollbackArgs};
pub(crate) use self::monitor::{MonitorArgs, MonitorType};
use self::node::{DOCTOR_HELP, INIT_HELP, UNINSTALL_HELP};
pub(crate) use self::node::{InitArgs, UninstallArgs};
use self::observe::OBSERVE_HELP;
pub(crate) use self::observe::{FilterArgs, ObserveArgs};
pub(crate) use self::replay::{FlowOutput, ReplayArgs};
pub(crate) use self::server::ServerArgs;
pub(crate) use output::{Output, OutputArgs};

use crate::config;

const EXIT_CODES: &str = "\
Exit codes:
  0  done; for validate, test and --check-config: nothing wrong
  1  the answer is no: errors in a file, failed checks, not ready in time, denied (trace, explain), changed
     verdicts (test --flows), nothing to propose (suggest)
  2  the command line cannot be understood
  3  the daemon is not running, or cannot be asked
  4  something else failed";

/// Identity firewall for bare-metal nodes.
#[derive(Debug, Parser)]
#[command(name = "palisade", version, about, after_help = EXIT_CODES, propagate_version = true)]
pub(crate) struct Cli {
    /// Command to run.
    #[command(subcommand)]
    pub command: Command,
    /// Path of the configuration.
    #[arg(long, global = true, value_name = "FILE", default_value = config::DEFAULT_PATH, env = "PALISADE_CONFIG")]
    pub config: PathBuf,
    /// Path of the daemon's control socket; by default that of the configuration.
    #[arg(long, global = true, value_name = "PATH", env = "PALISADE_SOCKET")]
    pub socket: Option<PathBuf>,
}

impl Cli {
    /// Returns whether `--config` or the environment variable PALISADE_CONFIG names the configuration. Otherwise
    /// `config` is the default path.
    pub(crate) fn names_config(&self) -> bool {
        let mut arguments = std::env::args_os();
        std::env::var_os("PALISADE_CONFIG").is_some()
            || arguments.any(|argument| {
                argument == "--config" || argument.as_encoded_bytes().starts_with(b"--config=")
            })
    }
}

/// Format of policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Default)]
pub(crate) enum PolicyOutput {
    /// Table for reading.
    #[default]
    Table,
    /// JSON for programs.
    Json,
    /// YAML of one policy in force.
    Yaml,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the daemon: fill the maps, attach the programs, watch policies and interfaces.
    #[command(after_help = "Examples:
  palisade run
  palisade run --config ./palisade.toml --check-config

Signals: TERM and INT end the daemon, what it attached keeps enforcing; HUP reads the configuration again.
Log: to stderr; PALISADE_LOG=debug for more.")]
    Run {
        /// Only check the configuration and print its errors.
        #[arg(long)]
        check_config: bool,
    },
    /// Show attachments, enforcement, fill levels of the maps, and problems.
    #[command(
        after_help = "Without --wait the exit code is 0 whenever the daemon answers, also if it is NOT READY.

Examples:
  palisade status
  palisade status --wait 10s && echo enforced
  palisade status --wait 0s || echo not ready"
    )]
    Status {
        /// Wait until all programs are attached and all policies enforced. When DURATION is over, print what is missing
        /// and exit with 1.
        #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
        wait: Option<Duration>,
        /// Print OK, or a line for each thing that is missing, and exit with 1 then.
        #[arg(long, conflicts_with_all = ["wait", "output"])]
        brief: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Make the daemon read the configuration and all policies again. A configuration with errors changes nothing.
    #[command(
        after_help = "The same as SIGHUP, but prints errors, also those of policy files; exits 1 if there are any. `palisade status` names
changed options that need a restart.

A configuration with which the policies in force deny the ssh session in which the command runs, for example one without
[policy] audit, is refused without --force. SIGHUP and `systemctl reload palisade` have no session, and check none. A policy
file that is saved in [policy] dir is in force at once, without this command and without a check: use
`palisade policy apply` for a file that could deny your session."
    )]
    Reload {
        /// Use the configuration also if it denies the session in which the command runs.
        #[arg(long)]
        force: bool,
    },
    /// Restart the daemon, for example after an upgrade. Inspected connections go on.
    #[command(
        after_help = "The daemon reads the configuration as with `palisade reload`, then executes its program again in the same process: the new
one, if it was replaced. The programs go on enforcing the last policy. HTTP/1, Kafka and DNS connections, and TLS handshakes
under serverNames, are handed over; the command prints how many were, and how many are reset. Intercepted connections are
always reset. With [worker] on_failure = \"pass\", or if the new program hands connections over in another form, all are.

Changed settings of the systemd unit need `systemctl restart palisade`, which resets inspected connections.

Examples:
  palisade restart"
    )]
    Restart {
        /// Restart also if the configuration denies the session in which the command runs.
        #[arg(long)]
        force: bool,
    },
    /// End the daemon. Its programs go on enforcing the last policy unless --detach is given.
    #[command(after_help = "Examples:
  palisade stop             the last policy stays enforced
  palisade stop --detach    nothing is left in the kernel; works also if the daemon is dead")]
    Stop {
        /// Detach all programs and remove all maps, so that nothing is enforced any more.
        #[arg(long)]
        detach: bool,
    },
    /// Write a first configuration and policy, in audit mode, from what is in use on this node.
    #[command(after_help = INIT_HELP)]
    Init(InitArgs),
    /// Check this node: kernel, file systems, interfaces, other programs, limits, configuration, service; and what to do.
    #[command(after_help = DOCTOR_HELP)]
    Doctor {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Remove everything of Palisade from this node: programs, pins, tables, links, state, sockets, logs.
    #[command(after_help = UNINSTALL_HELP)]
    Uninstall(UninstallArgs),
    /// The configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Policies: check, test, explain, list.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Endpoints of this node.
    #[command(subcommand)]
    Endpoint(EndpointCommand),
    /// Security identities.
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// Learned names.
    #[command(subcommand)]
    Fqdn(FqdnCommand),
    /// Intercepted connections: what is configured, upstream servers, certificates, live connections.
    #[command(subcommand)]
    Intercept(InterceptCommand),
    /// Content of the BPF maps.
    #[command(subcommand)]
    Bpf(BpfCommand),
    /// Nodes and namespaces that a server of the flow API reports about.
    #[command(subcommand)]
    List(ListCommand),
    /// Show flows per second, verdicts, talkers, rules, drops and workers, as they change.
    #[command(after_help = "Examples:
  palisade top
  palisade top --interval 5s
  palisade top --once

Talkers are counted since the command began, or since key r. NO_COLOR=1 turns colours off.")]
    Top(top::TopArgs),
    /// Levels of the daemon's log, and the inspection of connections step by step.
    #[command(subcommand)]
    Log(log::LogCommand),
    /// Show flows.
    #[command(after_help = OBSERVE_HELP)]
    Observe(ObserveArgs),
    /// Explain the verdict on a recorded flow or a described packet: the deciding rules, the rules that nearly match,
    /// and the smallest addition that would allow it.
    #[command(after_help = EXPLAIN_HELP)]
    Explain(Box<ExplainArgs>),
    /// Show what policies decide about the packets of a capture file. Needs neither daemon nor root.
    #[command(after_help = replay::HELP)]
    Replay(ReplayArgs),
    /// Write packets of flows to a pcapng file, with verdict, reason and rule in each packet's comment.
    #[command(after_help = CAPTURE_HELP)]
    Capture(Box<CaptureArgs>),
    /// Show each event of the programs as it arrives, one per line.
    #[command(after_help = monitor::HELP)]
    Monitor(MonitorArgs),
    /// Print the completion script for a shell. Needs neither daemon nor root.
    #[command(after_help = "The Debian package installs the scripts for bash, zsh and fish.

Examples:
  palisade completion bash > /etc/bash_completion.d/palisade
  palisade completion zsh > /usr/local/share/zsh/site-functions/_palisade
  palisade completion fish > /etc/fish/completions/palisade.fish")]
    Completion {
        /// Shell that reads the script.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the manual pages of the commands and of the configuration to a folder.
    #[command(hide = true)]
    Manual {
        /// Folder, which must exist.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// Date in the header of the pages.
        #[arg(long, value_name = "YYYY-MM-DD", default_value = "")]
        date: String,
    },
}

/// `palisade policy`.
#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Check policy files. Needs neither daemon nor root.
    #[command(after_help = "Examples:
  palisade policy validate web.yaml
  palisade policy validate /etc/palisade/policies.d
  palisade policy validate --config palisade.toml policies.d
  kubectl get cnp -A -o yaml | palisade policy validate -

Prints FILE:LINE:COL: MESSAGE for each error, warning and note, and exits 1 if there is an error. With --config also
what the policies come to for the endpoints and peers of this configuration: port names and nodeSelectors without
effect, groups of prefixes that do not exist, secrets that are missing or cannot be used.")]
    Validate {
        /// Files, folders (each *.yaml, *.yml and *.json is checked, without subfolders), or - for the standard input.
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
        /// Print only errors.
        #[arg(short, long)]
        quiet: bool,
    },
    /// Run case files, which are unit tests for policies, or replay recorded flows against candidate policies. Needs
    /// neither daemon nor root.
    #[command(after_help = "Examples:
  palisade policy test cases.jsonl
  palisade policy test tests/cases/*.yaml
  palisade policy test --flows flows.json --policies policies.new
  palisade policy test --flows flows.json --policies policies.new --report-only -o json

A case file has one JSON object a line, or YAML documents; docs/POLICY.md has all members:

  id: web
  policies:
  - apiVersion: cilium.io/v2
    kind: CiliumNetworkPolicy
    metadata: {name: web, namespace: shop}
    spec:
      endpointSelector: {matchLabels: {app: web}}
      ingress: [{fromEndpoints: [{matchLabels: {app: front}}]}]
  endpoints:
    web: {labels: ['k8s:app=web', 'k8s:io.kubernetes.pod.namespace=shop']}
  peers:
    front: {labels: ['k8s:app=front', 'k8s:io.kubernetes.pod.namespace=shop']}
  checks:
  - {subject: web, direction: ingress, peer: front, protocol: TCP, port: 80, expect: allow}
  - {subject: web, direction: ingress, peer: 192.0.2.1, protocol: TCP, port: 80, expect: deny}

Prints a line for each check that differs, with the deciding rule, then `N passed, M failed`, and exits 1 if a check
failed.

With --flows, prints the flows whose verdict would change, with the deciding rules, and exits 1 if there are any. The
file has JSON lines: `palisade observe -o json`, an exported file, or `hubble observe -o json`. The ends are identified
by their recorded labels, or with --config also by its endpoints and peers. The filters are those of `palisade observe`.")]
    Test {
        /// Case files.
        #[arg(
            required_unless_present = "flows",
            conflicts_with = "flows",
            value_name = "CASES"
        )]
        paths: Vec<PathBuf>,
        /// File of recorded flows; - for the standard input.
        #[arg(long, value_name = "FILE", requires = "policies")]
        flows: Option<PathBuf>,
        /// Candidate policies: files or folders.
        #[arg(long, value_name = "PATH", num_args = 1.., requires = "flows")]
        policies: Vec<PathBuf>,
        /// Exit 0 also if verdicts would change.
        #[arg(long, requires = "flows")]
        report_only: bool,
        /// With --flows: which of its flows are replayed.
        #[command(flatten)]
        filters: FilterArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Propose policies that allow recorded flows.
    #[command(after_help = "Examples:
  palisade policy suggest > policies.d/suggested.yaml
  palisade policy suggest --input-file flows.json
  palisade policy suggest --input-file flows.json --since 1h --to-label app=backend
  hubble observe -o json --last 10000 | palisade policy suggest --input-file -

Without --input-file the flows are those of the daemon's ring. Only flows that passed count, those that passed
only because of audit mode included; filters, which are those of `palisade observe`, choose among them. The policies have been compiled, and allow all of these flows. Review them: they
also allow flows that should not have passed.")]
    Suggest(SuggestArgs),
    /// Explain the verdict on a packet and the rules that decide. Asks the daemon, or works off-line on the given
    /// policy files.
    #[command(after_help = "Examples:
  palisade policy trace --from default/frontend --to default/backend --port 8080
  palisade policy trace --from world --to host --port 22
  palisade policy trace --from 192.0.2.7 --to default/web --port 443/tcp
  palisade policy trace --from default/a --to 10.0.9.5 --protocol icmp --port 8
  palisade policy trace --from default/a --to 192.0.2.53 --dns api.example.com
  palisade policy trace --from default/a --to default/b --http 'GET /items?id=1' --header 'X-Team: blue'
  palisade policy trace --from default/a --to 192.0.2.7 --sni api.example.com
  palisade policy trace --from default/a --to 192.0.2.7 --sni api.example.com --http 'GET https://api.example.com/x'
  palisade policy trace --from default/a --to default/broker --kafka 'produce orders' --client-id shop
  palisade policy trace --from default/a --to-fqdn api.example.com --port 443
  palisade policy trace --config palisade.toml --policies policies.d --from default/a --to default/b --port 53/udp

An end is an endpoint or a peer by name, an endpoint's number, an address, or a reserved identity that is in use
(host, world-ipv4, world-ipv6, remote-node, ...). world stands for the world of both address families, unless the other
end or the protocol has one; then two verdicts are printed, with -o json as an array.
Exits 0 if the packet would pass (also by audit mode, or once it was inspected), 1 if it would be dropped.")]
    Trace(Box<TraceArgs>),
    /// Put policy files in force, after showing what changes; with --confirm they are rolled back unless confirmed.
    #[command(after_help = change::APPLY_HELP)]
    Apply(ApplyArgs),
    /// Keep the change that `palisade policy apply --confirm` has made.
    #[command(after_help = "Examples:
  palisade policy confirm
  palisade policy confirm 12

With the number of the change, which `palisade policy apply` prints, only that change is confirmed.
Exits 1 if no change waits, for example because it was rolled back, or if another one waits.")]
    Confirm {
        /// Number of the change; without it, the one that waits.
        number: Option<u64>,
    },
    /// Roll back the change that waits for its confirmation, now.
    #[command(after_help = "Examples:
  palisade policy cancel
  palisade policy cancel 12

A rollback to policies that deny the ssh session in which the command runs is refused without --force. The rollback at the
deadline is not.

Exits 1 if no change waits, if another one waits, or if it is refused.")]
    Cancel {
        /// Number of the change; without it, the one that waits.
        number: Option<u64>,
        /// Roll back also if that denies the session in which the command runs.
        #[arg(long)]
        force: bool,
    },
    /// Show which verdicts differ between two sets of policies.
    #[command(after_help = change::DIFF_HELP)]
    Diff(DiffArgs),
    /// List the policy sets that were enforced: number, time, author, message, files.
    #[command(after_help = "Examples:
  palisade policy history
  palisade policy history -o json

The last 50 sets are kept in [node] state_dir, also those of files that were changed directly.")]
    History {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Put a set of the history in force again.
    #[command(after_help = change::ROLLBACK_HELP)]
    Rollback(RollbackArgs),
    /// List the policies in force, or show one policy with its rules and counters.
    Get {
        /// `namespace/name`, or the name of a cluster-wide policy.
        name: Option<String>,
        /// Format. For one policy, yaml prints the document in force, even if the file is broken now, and json prints
        /// the same resource and its rules.
        #[arg(short, long, value_enum, default_value_t)]
        output: PolicyOutput,
    },
    /// List the selectors of the policies and the identities that they select.
    Selectors {
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Flags of `palisade policy trace`.
#[derive(Debug, clap::Args)]
pub(crate) struct TraceArgs {
    /// Source of the packet.
    #[arg(long, visible_alias = "src", value_name = "END")]
    pub from: String,
    /// Destination of the packet.
    #[arg(
        long,
        visible_alias = "dst",
        value_name = "END",
        required_unless_present = "to_fqdn"
    )]
    pub to: Option<String>,
    /// The rest of the packet.
    #[command(flatten)]
    pub packet: PacketArgs,
    /// Work off-line with these policy files or folders, and the endpoints and peers of --config.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub policies: Vec<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Examples and notes of `palisade explain`.
const EXPLAIN_HELP: &str = "Examples:
  palisade explain 7c9d6c52-0000-8000-8000-00000000002a
  palisade explain --from default/frontend --to default/backend --port 8080
  palisade explain --from default/a --to default/b --http 'PUT /items/1'
  palisade explain --from default/a --to-fqdn api.example.com --port 443
  palisade explain --config palisade.toml --policies policies.d --from default/a --to default/b --port 53/udp
  palisade explain --input-file flows.json --policies policies.d 7c9d6c52-0000-8000-8000-00000000002a

`palisade observe -o json` shows the UUID of each flow. The addition is printed only if the packet passes with it: it is
compiled together with the policies in force, and the packet is evaluated again. It changes nothing by itself.
Exits 0 if the packet would pass, 1 if it would be dropped.";

/// Flags of `palisade explain`.
#[derive(Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    /// UUID of a recorded flow.
    #[arg(value_name = "UUID", required_unless_present = "from", conflicts_with_all = ["from", "to", "to_fqdn"])]
    pub flow: Option<String>,
    /// Take the flow from this file of JSON lines (of Palisade or of Hubble), not from the daemon.
    #[arg(long, value_name = "FILE", requires = "flow")]
    pub input_file: Option<PathBuf>,
    /// Source of the packet.
    #[arg(long, visible_alias = "src", value_name = "END")]
    pub from: Option<String>,
    /// Destination of the packet.
    #[arg(long, visible_alias = "dst", value_name = "END", requires = "from")]
    pub to: Option<String>,
    /// The packet, if it is described.
    #[command(flatten)]
    pub packet: PacketArgs,
    /// Work off-line with these policy files or folders, and the endpoints and peers of --config; for a flow of
    /// --input-file without --config, with the labels in the record.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub policies: Vec<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Flags of `palisade policy suggest`.
#[derive(Debug, clap::Args)]
pub(crate) struct SuggestArgs {
    /// File of recorded flows as JSON lines, Palisade's or Hubble's; - for the standard input.
    #[arg(long, value_name = "FILE")]
    pub input_file: Option<PathBuf>,
    /// Also allow the flows that were dropped by policies.
    #[arg(long)]
    pub include_dropped: bool,
    /// Policies from which rules for requests inside TLS take the names of their secrets: files or folders.
    #[arg(long, value_name = "PATH")]
    pub policies: Vec<PathBuf>,
    /// Which flows count.
    #[command(flatten)]
    pub filters: FilterArgs,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: SuggestOutput,
}

/// `-o` of `palisade policy suggest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Default)]
pub(crate) enum SuggestOutput {
    /// Policies as YAML documents.
    #[default]
    Yaml,
    /// The policies and the numbers of flows as JSON.
    Json,
}

/// Flags that describe a packet, besides its source and destination.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct PacketArgs {
    /// Name by which the source has learned the destination; --to can give the destination's address.
    #[arg(long, value_name = "NAME")]
    pub to_fqdn: Option<String>,
    /// Name that the packet queries in DNS (without --port and --protocol: 53/udp).
    #[arg(long, value_name = "NAME", conflicts_with_all = ["http", "sni", "kafka"])]
    pub dns: Option<String>,
    /// HTTP request on the connection: 'GET /x' or 'GET http://host/x' (without --port and --protocol: 80/tcp, with
    /// https or --sni 443/tcp).
    #[arg(long, value_name = "REQUEST", conflicts_with = "kafka")]
    pub http: Option<String>,
    /// A header of the HTTP request.
    #[arg(long = "header", value_name = "NAME: VALUE", requires = "http")]
    pub headers: Vec<String>,
    /// Server name in the TLS ClientHello; '' for a ClientHello without one (without --port and --protocol: 443/tcp).
    /// With --http: of the intercepted connection that has the request.
    #[arg(long, value_name = "NAME", conflicts_with = "kafka")]
    pub sni: Option<String>,
    /// Kafka request: an API key by name or number, perhaps with a version, then its topics: 'metadata',
    /// 'fetch/12 orders bills' (without a version the last one that is known; without --port and --protocol: 9092/tcp).
    #[arg(long, value_name = "REQUEST")]
    pub kafka: Option<String>,
    /// Client id of the Kafka request.
    #[arg(long, value_name = "ID", requires = "kafka")]
    pub client_id: Option<String>,
    /// tcp, udp, sctp, icmp, icmpv6, or a number.
    #[arg(long, value_name = "PROTOCOL")]
    pub protocol: Option<String>,
    /// Destination port, with or without protocol (8080, 53/udp); for ICMP the type.
    #[arg(long, visible_alias = "dport", value_name = "PORT[/PROTOCOL]")]
    pub port: Option<String>,
}

/// `palisade config`.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Show the value of every option: that of the file, or its default. Needs no daemon.
    #[command(after_help = "Examples:
  palisade config view | grep timeouts
  palisade config view -o json

`palisade status` reports options of the file that the running daemon uses only after a restart.")]
    View {
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// `palisade endpoint`.
#[derive(Debug, Subcommand)]
pub(crate) enum EndpointCommand {
    /// List the endpoints.
    #[command(after_help = "Examples:
  palisade endpoint list
  palisade endpoint list -l app=web,tier!=test
  palisade endpoint list -o json | jq '.[] | select(.identity == 1) | .id'")]
    List {
        /// Only endpoints whose labels meet all requirements: key, !key, key=value, key!=value. A key without a source is
        /// that of any source.
        #[arg(short = 'l', long, value_name = "LABELS", value_delimiter = ',')]
        labels: Vec<String>,
        /// Leave out the line with the names of the columns.
        #[arg(long)]
        no_headers: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one endpoint.
    Get {
        /// Number, name or address.
        endpoint: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show or set options of an endpoint. They survive a restart.
    #[command(after_help = "Examples:
  palisade endpoint config 2
  palisade endpoint config default/frontend PolicyAuditMode=Enabled

Options:
  PolicyAuditMode    what would be dropped passes and is reported")]
    Config {
        /// Number, name or address.
        endpoint: String,
        /// OPTION=Enabled or OPTION=Disabled.
        #[arg(value_name = "OPTION=VALUE")]
        options: Vec<String>,
        /// Set them also if that denies the session in which the command runs.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// `palisade identity`.
#[derive(Debug, Subcommand)]
pub(crate) enum IdentityCommand {
    /// List the identities in use.
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one identity.
    Get {
        /// Number, or name of a reserved identity (host, world-ipv4, ...).
        identity: String,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// `palisade fqdn`.
#[derive(Debug, Subcommand)]
pub(crate) enum FqdnCommand {
    /// Names that endpoints have resolved, with their addresses.
    #[command(subcommand)]
    Cache(FqdnCacheCommand),
}

/// `palisade fqdn cache`.
#[derive(Debug, Subcommand)]
pub(crate) enum FqdnCacheCommand {
    /// List names and addresses.
    List {
        /// Only names of this endpoint (number, name or address).
        #[arg(long, short)]
        endpoint: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Remove learned names, even if they are in use. Clients must resolve them again, and their connections are
    /// evaluated again.
    #[command(after_help = "Examples:
  palisade fqdn cache clean
  palisade fqdn cache clean --endpoint default/frontend --name www.example.com
  palisade fqdn cache clean --pattern '*.example.com'")]
    Clean {
        /// Only names of this endpoint (number, name or address).
        #[arg(long, short)]
        endpoint: Option<String>,
        /// Only this name.
        #[arg(long)]
        name: Option<String>,
        /// Only names that match this pattern, in the syntax of matchPattern.
        #[arg(long, conflicts_with = "name")]
        pattern: Option<String>,
    },
}

/// `palisade intercept`.
#[derive(Debug, Subcommand)]
pub(crate) enum InterceptCommand {
    /// Show which traffic of which endpoint is intercepted, and with which secrets.
    Config {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// List the servers to which intercepted connections were opened, with failures by reason.
    Clusters {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// List the certificates of the secrets folder, and what is wrong with the secrets that policies name.
    Certs {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show the proxy threads and their counters.
    Stats {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// List live intercepted connections with the TLS parameters of both sides.
    Connections {
        /// Maximum number of connections.
        #[arg(long, value_name = "COUNT", default_value_t = 1_000)]
        limit: usize,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Open a TLS connection to a server as an intercepted connection from an endpoint, or to an endpoint, would be
    /// opened, and show each step: address, server name and ALPN sent, certificates, alerts.
    #[command(after_help = "Examples:
  palisade intercept check bucket.s3.example.com --from default/backup
  palisade intercept check api.example.com:8443 --from default/frontend --address 192.0.2.7
  palisade intercept check shop.example.com --to default/shop --client 198.51.100.7

Without --address the address is one that the endpoint has learned by this name.
Exits 0 if the connection would be established, 1 if not.")]
    Check {
        /// Name of the server, with a port unless it is 443.
        #[arg(value_name = "NAME[:PORT]")]
        server: String,
        #[command(flatten)]
        ends: CheckArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Ends of the connection of `palisade intercept check`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct CheckArgs {
    /// The endpoint that opens the connection: number, name or address.
    #[arg(
        long,
        value_name = "ENDPOINT",
        required_unless_present = "to",
        conflicts_with = "to"
    )]
    pub from: Option<String>,
    /// Address of the server.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "to")]
    pub address: Option<std::net::IpAddr>,
    /// The endpoint that is the server: number, name or address.
    #[arg(long, value_name = "ENDPOINT", requires = "client")]
    pub to: Option<String>,
    /// Address of the client of a connection to an endpoint.
    #[arg(long, value_name = "ADDRESS", requires = "to")]
    pub client: Option<std::net::IpAddr>,
}

/// `palisade list`.
#[derive(Debug, Subcommand)]
pub(crate) enum ListCommand {
    /// List the nodes: their state, and how full their flow rings are.
    #[command(after_help = "Examples:
  palisade list nodes
  palisade list nodes --server tls://relay:4245 --tls-ca-cert-files ca.crt

Without --server, the daemon of this node is asked at the socket of its flow API.")]
    Nodes {
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// List the namespaces of the flows of the last hour.
    #[command(after_help = "Examples:
  palisade list namespaces
  palisade list namespaces --server node1:4245

Without --server, the daemon of this node is asked at the socket of its flow API.")]
    Namespaces {
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// `palisade bpf`.
#[derive(Debug, Subcommand)]
pub(crate) enum BpfCommand {
    /// The policy tables.
    #[command(subcommand)]
    Policy(BpfPolicyCommand),
    /// The connections.
    #[command(subcommand)]
    Ct(BpfCtCommand),
    /// The identities of addresses.
    #[command(subcommand)]
    Ipcache(BpfIpcacheCommand),
}

/// `palisade bpf policy`.
#[derive(Debug, Subcommand)]
pub(crate) enum BpfPolicyCommand {
    /// Show the table of an endpoint, or of all. A rule has one counter for all its entries, shown in its first row.
    Get {
        /// Number, name or address.
        #[arg(required_unless_present = "all")]
        endpoint: Option<String>,
        /// The tables of all endpoints.
        #[arg(long, conflicts_with = "endpoint")]
        all: bool,
        /// Leave out the labels of identities.
        #[arg(short, long)]
        numeric: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// `palisade bpf ct`.
#[derive(Debug, Subcommand)]
pub(crate) enum BpfCtCommand {
    /// List the entries of connections, in the order of endpoint, protocol and addresses; more than 10,000 as they are read.
    #[command(after_help = "Examples:
  palisade bpf ct list
  palisade bpf ct list shop/web --protocol tcp --port 443 -o json
  palisade bpf ct list --address 198.51.100.0/24 --direction ingress")]
    List {
        #[command(flatten)]
        connections: ConnectionArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Remove the entries of connections, so that their next packets get a new verdict.
    #[command(after_help = "Examples:
  palisade bpf ct flush shop/web
  palisade bpf ct flush --address 198.51.100.7 --port 22
  palisade bpf ct flush global --yes

Connections that no policy inspects go on if the policies allow them. Inspected and intercepted ones are reset at both
ends, and answers to DNS queries that are under way are dropped. Entries of connections that the policies deny stay.

Without endpoint and filter it asks, or needs --yes. Exits 1 if the answer was no.")]
    Flush {
        #[command(flatten)]
        connections: ConnectionArgs,
        /// Do not ask.
        #[arg(short, long, visible_alias = "force")]
        yes: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Which connections `palisade bpf ct` is about. Different options must all match.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct ConnectionArgs {
    /// Number, name or address of an endpoint, or global for all.
    #[arg(value_name = "ENDPOINT|global")]
    pub scope: Option<String>,
    /// Number, name or address of the endpoint.
    #[arg(long, value_name = "ENDPOINT", conflicts_with = "scope")]
    pub endpoint: Option<String>,
    /// Address or prefix of either end. Several are alternatives.
    #[arg(long = "address", visible_alias = "ip", value_name = "ADDRESS[/LENGTH]", value_delimiter = ',', value_parser = prefix)]
    pub addresses: Vec<IpNet>,
    /// Port of either end. Several are alternatives.
    #[arg(long = "port", value_name = "PORT", value_delimiter = ',')]
    pub ports: Vec<u16>,
    /// tcp, udp, sctp, icmp, icmpv6, or a number.
    #[arg(long, value_name = "PROTOCOL")]
    pub protocol: Option<String>,
    /// Whether the peer opened the connection (ingress) or the endpoint (egress).
    #[arg(long, value_enum)]
    pub direction: Option<ConnectionDirection>,
    /// Number of the peer's identity.
    #[arg(long, value_name = "NUMBER")]
    pub identity: Option<u32>,
}

/// End that opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConnectionDirection {
    /// The peer.
    Ingress,
    /// The endpoint.
    Egress,
}

impl ConnectionDirection {
    /// Returns whether the peer opened the connection.
    pub(crate) fn is_ingress(self) -> bool {
        self == Self::Ingress
    }
}

/// Returns an address as the prefix that has only this address, or a prefix.
fn prefix(text: &str) -> Result<IpNet, String> {
    let address = text.parse::<std::net::IpAddr>().map(IpNet::from);
    address
        .or_else(|_| text.parse())
        .map_err(|_| "it is no address and no prefix".to_owned())
}

/// `palisade bpf ipcache`.
#[derive(Debug, Subcommand)]
pub(crate) enum BpfIpcacheCommand {
    /// List all addresses and prefixes.
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Returns the commands that a text names: in backquotes, at the start of a line, or as a path of the installed
    /// binary.
    fn named_commands(text: &str) -> Vec<&str> {
        let mut found: Vec<&str> = text
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("palisade "))
            .collect();
        for marker in ["`palisade ", "/usr/bin/palisade "] {
            for (at, _) in text.match_indices(marker) {
                let rest = &text[at + marker.len()..];
                found.push(&rest[..rest.find(['`', '\n']).unwrap_or(rest.len())]);
            }
        }
        found
    }

    /// Checks the subcommands and flags of a command line in the notation of documents: `[...]` is optional, `...`
    /// repeats.
    fn check(line: &str) -> Result<(), String> {
        let root = Cli::command();
        let mut command = &root;
        for token in line.split_whitespace() {
            let token = token.trim_matches(['[', ']', '(', ')', ',', ';', '"', '\'', '.', ':']);
            if let Some(long) = token.strip_prefix("--") {
                let long = long.split('=').next().unwrap_or_default();
                let mut arguments = command.get_arguments().chain(root.get_arguments());
                let known = long.is_empty()
                    || matches!(long, "help" | "version")
                    || arguments.any(|a| {
                        a.get_long() == Some(long)
                            || a.get_visible_aliases().is_some_and(|all| all.contains(&long))
                    });
                if !known {
                    return Err(format!("{} has no --{long}", command.get_name()));
                }
            } else if let Some(short) = token.strip_prefix('-').and_then(|rest| rest.chars().next()) {
                if !command.get_arguments().any(|a| a.get_short() == Some(short)) {
                    return Err(format!("{} has no -{short}", command.get_name()));
                }
            } else if matches!(token, "|" | "||" | "&&" | "#") {
                break;
            } else if command.has_subcommands() {
                command = command
                    .find_subcommand(token)
                    .ok_or_else(|| format!("{} has no subcommand {token}", command.get_name()))?;
            }
        }
        Ok(())
    }

    /// Returns the files whose name ends in one of `endings`, below a folder of the repository.
    fn files(folder: &str, endings: &[&str]) -> Vec<PathBuf> {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut dirs = vec![root.join(folder)];
        let mut files = Vec::new();
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                if path.is_dir() && name != "target" {
                    dirs.push(path);
                } else if endings.iter().any(|ending| name.ends_with(ending)) {
                    files.push(path);
                }
            }
        }
        files
    }

    #[test]
    fn every_command_that_a_document_names_exists() {
        check("stop [--detach]").unwrap();
        check("policy trace --from A --to B --port 80 -o json").unwrap();
        assert!(check("stop --detch").is_err() && check("polcy get").is_err() && check("stop -x").is_err());
        let mut texts = files("docs", &[".md"]);
        texts.extend(files("config", &[".toml", ".service"]));
        texts.extend(files("crates/palisade/src", &[".rs"]));
        texts.extend(files("crates/datapath/src", &[".rs"]));
        texts.push(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../README.md"));
        let mut commands = 0;
        for path in texts {
            let text = std::fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            // Joins string literals that continue on the next line.
            let text: String = text.split("\\\n").map(str::trim_start).collect();
            for line in named_commands(&text) {
                commands += 1;
                check(line)
                    .unwrap_or_else(|problem| panic!("{}: palisade {line}: {problem}", path.display()));
            }
        }
        assert!(commands > 40, "{commands}");
    }

    #[test]
    fn the_readme_names_every_command() {
        fn leaves(command: &clap::Command, path: &str, found: &mut Vec<String>) {
            for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
                let path = format!("{path} {}", sub.get_name());
                if sub.has_subcommands() {
                    leaves(sub, &path, found);
                } else {
                    found.push(path);
                }
            }
        }
        let mut found = Vec::new();
        leaves(&Cli::command(), "palisade", &mut found);
        let readme = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
        let readme = std::fs::read_to_string(readme).unwrap();
        for path in found {
            assert!(readme.contains(&format!("`{path}")), "{path}");
        }
    }
}
