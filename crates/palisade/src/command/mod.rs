//! What the commands do.

mod flows;
mod inspect;
mod policy;
mod service;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;

use crate::{
    cli::{
        BpfCommand, BpfCtCommand, BpfIpcacheCommand, BpfPolicyCommand, Cli, Command, EndpointCommand,
        FqdnCacheCommand, FqdnCommand, IdentityCommand, Output, PolicyCommand,
    },
    config::{self, Config, ConfigError},
    control::client::ClientError,
};

/// Done.
pub const DONE: u8 = 0;
/// The answer is no.
pub const NO: u8 = 1;
/// The daemon cannot be asked.
pub const NO_DAEMON: u8 = 3;
/// Something else failed.
pub const FAILED: u8 = 4;

/// Does what the command line says.
pub fn execute(cli: Cli) -> ExitCode {
    let outcome = dispatch(&cli).and_then(|code| {
        io::stdout().flush()?;
        Ok(code)
    });
    let code = outcome.unwrap_or_else(|error| {
        // Whoever read the output wants no more of it (`| head`).
        if error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        {
            return DONE;
        }
        eprintln!("palisade: {error:#}");
        match error.downcast_ref::<ClientError>() {
            Some(ClientError::Refused(_)) | None => FAILED,
            Some(_) => NO_DAEMON,
        }
    });
    ExitCode::from(code)
}

fn dispatch(cli: &Cli) -> anyhow::Result<u8> {
    let socket = || socket(cli);
    match &cli.command {
        Command::Run { check_config: true } => check_config(&cli.config),
        Command::Run { check_config: false } => service::run(&cli.config),
        Command::Status { wait, output } => service::status(&socket(), *wait, output.output),
        Command::Reload => service::reload(&cli.config, &socket()),
        Command::Stop { detach } => service::stop(&cli.config, &socket(), *detach),
        Command::Policy(command) => match command {
            PolicyCommand::Validate { paths, quiet } => policy::validate(paths, *quiet),
            PolicyCommand::Test { paths } => policy::test(paths),
            PolicyCommand::Trace(args) => {
                let request = policy::trace_request(args)?;
                policy::trace(
                    &cli.config,
                    &socket(),
                    request,
                    &args.policies,
                    args.output.output,
                )
            }
            PolicyCommand::Get { name, output } => {
                inspect::policies(&socket(), name.as_deref(), output.output)
            }
            PolicyCommand::Selectors { output } => inspect::selectors(&socket(), output.output),
        },
        Command::Endpoint(command) => match command {
            EndpointCommand::List { output } => inspect::endpoints(&socket(), output.output),
            EndpointCommand::Get { endpoint, output } => {
                inspect::endpoint(&socket(), endpoint, output.output)
            }
            EndpointCommand::Config {
                endpoint,
                options,
                output,
            } => inspect::endpoint_config(&socket(), endpoint, options, output.output),
        },
        Command::Identity(command) => match command {
            IdentityCommand::List { output } => inspect::identities(&socket(), output.output),
            IdentityCommand::Get { identity, output } => {
                inspect::identity(&socket(), *identity, output.output)
            }
        },
        Command::Fqdn(FqdnCommand::Cache(command)) => match command {
            FqdnCacheCommand::List { endpoint, output } => {
                inspect::names(&socket(), endpoint.as_deref(), output.output)
            }
            FqdnCacheCommand::Clean {
                endpoint,
                name,
                pattern,
            } => inspect::clean_names(&socket(), endpoint.clone(), name.clone(), pattern.clone()),
        },
        Command::Bpf(command) => match command {
            BpfCommand::Policy(BpfPolicyCommand::Get { endpoint, output }) => {
                inspect::policy_table(&socket(), endpoint, output.output)
            }
            BpfCommand::Ct(BpfCtCommand::List { output, .. }) => {
                inspect::connections(&socket(), output.output)
            }
            BpfCommand::Ipcache(BpfIpcacheCommand::List { output }) => {
                inspect::ipcache(&socket(), output.output)
            }
        },
        Command::Observe(args) => flows::observe(&socket(), args),
        Command::Monitor {
            types,
            related_to,
            output,
        } => flows::monitor(&socket(), types, related_to.as_deref(), output.output),
    }
}

/// The socket of the running daemon: as asked for, as configured, or the usual one.
fn socket(cli: &Cli) -> PathBuf {
    if let Some(socket) = &cli.socket {
        return socket.clone();
    }
    // A configuration that was broken since the daemon read it must not keep anybody from asking it.
    Config::load(&cli.config).map_or_else(|_| config::DEFAULT_SOCKET.into(), |config| config.node.socket)
}

/// The configuration; if it is wrong, every error is printed and nothing is answered.
fn load_config(path: &Path) -> Option<Config> {
    Config::load(path).map_err(|errors| print_errors(&errors)).ok()
}

fn print_errors(errors: &[ConfigError]) {
    for error in errors {
        eprintln!("{error}");
    }
}

fn check_config(path: &Path) -> anyhow::Result<u8> {
    let Some(config) = load_config(path) else {
        return Ok(NO);
    };
    writeln!(
        io::stdout(),
        "{}: valid: {} interfaces, {} endpoints, {} peers",
        path.display(),
        config.interfaces.len(),
        config.endpoints.len(),
        config.peers.len()
    )?;
    Ok(DONE)
}

/// An answer as JSON, or as `table` writes it for people.
fn show<T: Serialize>(
    answer: &T,
    output: Output,
    table: impl FnOnce(&T, &mut dyn io::Write) -> io::Result<()>,
) -> anyhow::Result<u8> {
    let mut out = io::stdout().lock();
    match output {
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, answer)?;
            writeln!(out)?;
        }
        Output::Table => table(answer, &mut out)?,
    }
    Ok(DONE)
}
