//! Dispatch of the commands.

mod capture;
mod config;
mod conntrack;
mod doctor;
mod explain;
mod flow_api;
mod flows;
mod follow;
mod init;
mod inspect;
mod intercept;
mod list;
mod log;
mod manual;
mod monitor;
mod output;
mod pinned;
mod policy;
mod policy_change;
mod recorded;
mod recorded_policies;
mod replay;
mod service;
mod session;
mod top;
mod trace;
mod uninstall;

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::bail;

use crate::{
    cli::{
        BpfCommand, BpfCtCommand, BpfIpcacheCommand, BpfPolicyCommand, Cli, Command, ConfigCommand,
        EndpointCommand, FqdnCacheCommand, FqdnCommand, IdentityCommand, InterceptCommand, ListCommand,
        PolicyCommand,
    },
    config::{Config, DEFAULT_PATH, DEFAULT_SOCKET},
    control::client::ClientError,
    text::chain,
};
use output::{EXIT_FAILED, EXIT_NO_DAEMON, EXIT_OK};

/// Runs the command of the command line and returns its exit code.
pub(crate) fn execute(cli: Cli) -> ExitCode {
    let outcome = dispatch(&cli).and_then(|code| {
        io::stdout().flush()?;
        Ok(code)
    });
    let code = outcome.unwrap_or_else(|error| {
        // A closed pipe is no error: the reader (`| head`) needs no more output.
        if error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        {
            return EXIT_OK;
        }
        eprintln!("palisade: {}", chain(&error));
        match error.downcast_ref::<ClientError>() {
            Some(ClientError::Refused(_)) | None => EXIT_FAILED,
            Some(_) => EXIT_NO_DAEMON,
        }
    });
    ExitCode::from(code)
}

fn dispatch(cli: &Cli) -> anyhow::Result<u8> {
    let asked = match &cli.command {
        // These commands read the configuration themselves, or need none.
        Command::Run { .. }
        | Command::Completion { .. }
        | Command::Manual { .. }
        | Command::Replay(_)
        | Command::Policy(
            PolicyCommand::Validate { .. }
            | PolicyCommand::Test { .. }
            | PolicyCommand::Trace(_)
            | PolicyCommand::Suggest(_),
        )
        | Command::Explain(_)
        | Command::Config(_)
        | Command::Init(_)
        | Command::Doctor { .. }
        | Command::Uninstall(_)
        | Command::List(_)
        | Command::Observe(_) => None,
        _ => Some(socket(cli)?),
    };
    let socket = || asked.clone().map_or_else(|| socket(cli), Ok);
    match &cli.command {
        Command::Run { check_config: true } => service::check_config(&cli.config),
        Command::Run { check_config: false } => service::run(&cli.config),
        Command::Status { brief: true, .. } => service::brief_status(&cli.config, &socket()?),
        Command::Status { wait, output, .. } => {
            service::status(&cli.config, &socket()?, *wait, output.output)
        }
        Command::Completion { shell } => manual::completion(*shell),
        Command::Manual { dir, date } => manual::write(dir, date),
        Command::Reload { force } => service::reload(&cli.config, &socket()?, *force),
        Command::Restart { force } => service::restart(&cli.config, &socket()?, *force),
        Command::Stop { detach } => service::stop(&cli.config, &socket()?, *detach),
        Command::Config(ConfigCommand::View { output }) => config::view(&cli.config, output.output),
        Command::Init(args) => init::run(&cli.config, args),
        Command::Doctor { output } => doctor::run(&cli.config, cli.socket.as_deref(), output.output),
        Command::Uninstall(args) => uninstall::run(&cli.config, cli.socket.as_deref(), args),
        Command::Policy(command) => match command {
            PolicyCommand::Validate { paths, quiet } => {
                policy::validate(paths, *quiet, cli.names_config().then_some(&*cli.config))
            }
            PolicyCommand::Test {
                flows: Some(flows),
                policies,
                report_only,
                filters,
                output,
                ..
            } => recorded_policies::test(
                cli.names_config().then_some(&*cli.config),
                flows,
                policies,
                *report_only,
                filters,
                output.output,
            ),
            PolicyCommand::Test { filters, .. } if !filters.is_empty() => {
                bail!("filters choose recorded flows: name their file (--flows FILE --policies PATH)")
            }
            PolicyCommand::Test { paths, .. } => policy::test(paths),
            PolicyCommand::Suggest(args) => recorded_policies::suggest(socket, args),
            PolicyCommand::Trace(args) => {
                let requests = trace::trace_requests(&args.from, args.to.as_deref(), &args.packet)?;
                trace::trace(
                    &cli.config,
                    &socket()?,
                    requests,
                    &args.policies,
                    args.output.output,
                )
            }
            PolicyCommand::Apply(args) => policy_change::apply(&socket()?, &args.path, &args.change),
            PolicyCommand::Confirm { number } => policy_change::confirm(&socket()?, *number),
            PolicyCommand::Cancel { number, force } => policy_change::cancel(&socket()?, *number, *force),
            PolicyCommand::Diff(args) => policy_change::diff(&cli.config, socket, args),
            PolicyCommand::History { output } => policy_change::history(&socket()?, output.output),
            PolicyCommand::Rollback(args) => policy_change::rollback(&socket()?, args.number, &args.change),
            PolicyCommand::Get { name, output } => inspect::policies(&socket()?, name.as_deref(), *output),
            PolicyCommand::Selectors { output } => inspect::selectors(&socket()?, output.output),
        },
        Command::Endpoint(command) => match command {
            EndpointCommand::List {
                labels,
                no_headers,
                output,
            } => inspect::endpoints(&socket()?, labels, *no_headers, output.output),
            EndpointCommand::Get { endpoint, output } => {
                inspect::endpoint(&socket()?, endpoint, output.output)
            }
            EndpointCommand::Config {
                endpoint,
                options,
                force,
                output,
            } => inspect::endpoint_config(&socket()?, endpoint, options, *force, output.output),
        },
        Command::Identity(command) => match command {
            IdentityCommand::List { output } => inspect::identities(&socket()?, output.output),
            IdentityCommand::Get { identity, output } => {
                inspect::identity(&socket()?, identity, output.output)
            }
        },
        Command::Fqdn(FqdnCommand::Cache(command)) => match command {
            FqdnCacheCommand::List { endpoint, output } => {
                inspect::names(&socket()?, endpoint.as_deref(), output.output)
            }
            FqdnCacheCommand::Clean {
                endpoint,
                name,
                pattern,
            } => inspect::clean_names(&socket()?, endpoint.clone(), name.clone(), pattern.clone()),
        },
        Command::Intercept(command) => match command {
            InterceptCommand::Config { output } => intercept::config(&socket()?, output.output),
            InterceptCommand::Clusters { output } => intercept::clusters(&socket()?, output.output),
            InterceptCommand::Certs { output } => intercept::certs(&socket()?, output.output),
            InterceptCommand::Stats { output } => intercept::stats(&socket()?, output.output),
            InterceptCommand::Connections { limit, output } => {
                intercept::connections(&socket()?, *limit, output.output)
            }
            InterceptCommand::Check { server, ends, output } => {
                intercept::check(&socket()?, server, ends, output.output)
            }
        },
        Command::Bpf(command) => match command {
            BpfCommand::Policy(BpfPolicyCommand::Get {
                endpoint,
                all: _,
                numeric,
                output,
            }) => inspect::policy_table(
                &socket()?,
                &cli.config,
                endpoint.as_deref(),
                *numeric,
                output.output,
            ),
            BpfCommand::Ct(BpfCtCommand::List { connections, output }) => {
                conntrack::list(&socket()?, &cli.config, connections, output.output)
            }
            BpfCommand::Ct(BpfCtCommand::Flush {
                connections,
                yes,
                output,
            }) => conntrack::flush(&socket()?, connections, *yes, output.output),
            BpfCommand::Ipcache(BpfIpcacheCommand::List { output }) => {
                inspect::ipcache(&socket()?, &cli.config, output.output)
            }
        },
        Command::Explain(args) => explain::explain((&cli.config, cli.names_config()), socket, args),
        Command::Log(command) => log::run(&socket()?, command),
        Command::Replay(args) => replay::replay(&cli.config, args),
        Command::Capture(args) => capture::capture(&socket()?, args),
        Command::Observe(args) => flows::observe(socket, args),
        Command::List(ListCommand::Nodes { server, output }) => {
            list::nodes(&cli.config, server, output.output)
        }
        Command::List(ListCommand::Namespaces { server, output }) => {
            list::namespaces(&cli.config, server, output.output)
        }
        Command::Top(args) => top::run(&socket()?, args),
        Command::Monitor(args) => monitor::monitor(&socket()?, args),
    }
}

/// Returns the path of the daemon's socket: from the command line, else from the configuration, else the default.
fn socket(cli: &Cli) -> anyhow::Result<PathBuf> {
    if let Some(socket) = &cli.socket {
        return Ok(socket.clone());
    }
    let text = match fs::read_to_string(&cli.config) {
        Ok(text) => text,
        // Without a configuration both daemon and command use the default socket.
        Err(_) if cli.config == Path::new(DEFAULT_PATH) => String::new(),
        Err(error) => bail!(
            "{}: {error}; --config names the daemon to ask",
            cli.config.display()
        ),
    };
    // Only the socket's path is read, so that a file that is broken now does not prevent commands to the running
    // daemon.
    Ok(Config::node_path(&text, "socket").unwrap_or_else(|| DEFAULT_SOCKET.into()))
}
