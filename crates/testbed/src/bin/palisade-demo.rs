//! The program of `scripts/demo`: runs real programs in network namespaces under the policies of `config/examples`, and
//! shows which connections are allowed and which rule decided.

use std::{
    io::IsTerminal,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal};
use palisade_testbed::{
    Daemon,
    daemon::Settings,
    demo::{
        ATTEMPTS, Attempt, BY_NAME, INSIDE,
        Program::{Curl, Dig, Http, Https, Iperf3 as Iperf, Ping},
        Row, World, attempt_all, attempt_in_turn, examples,
    },
    topology::{FAMILIES, Family},
};

/// Whether a signal has arrived. The thread that waits for signals then ends the process.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let verbose = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("--verbose") => true,
        Some(other) => {
            eprintln!("demo: unknown option {other}; the only option is --verbose");
            return ExitCode::from(2);
        }
    };
    let outcome = clean_up_on_signals().and_then(|()| demo(verbose));
    while INTERRUPTED.load(Ordering::SeqCst) {
        // After a signal, the thread of `clean_up_on_signals` removes the namespaces and then ends the process.
        thread::park();
    }
    match outcome {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Makes SIGINT, SIGTERM and SIGHUP remove all namespaces of the demo before they end the demo.
fn clean_up_on_signals() -> Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    // Block the signals before other threads start. These threads inherit the mask, so only the thread below handles
    // the signals.
    set.thread_block()?;
    thread::spawn(move || {
        if let Ok(signal) = set.wait() {
            INTERRUPTED.store(true, Ordering::SeqCst);
            eprintln!("\ndemo: {signal}: cleaning up");
            palisade_testbed::ns::remove_own();
            std::process::exit(128 + signal as i32);
        }
    });
    Ok(())
}

/// The style of the output: colours on a terminal, plain text otherwise.
struct Style {
    color: bool,
}

impl Style {
    fn paint(&self, code: &str, text: &str) -> String {
        if self.color {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn heading(&self, text: &str) {
        println!("\n{}", self.paint("1", text));
    }
}

/// Runs the demo. Returns the number of attempts whose outcome was not the expected one.
fn demo(verbose: bool) -> Result<usize> {
    let start = Instant::now();
    let style = Style {
        color: std::io::stdout().is_terminal(),
    };
    style.heading("Network namespaces");
    let world = World::new()?;
    draw(&world)?;
    let _servers = world.serve()?;

    let policies = examples()?;
    let borrowed: Vec<(&str, &str)> = policies.iter().map(|(n, c)| (n.as_str(), c.as_str())).collect();
    style.heading("Palisade");
    let daemon = Daemon::start(&world.topology, &Settings::default(), &borrowed)?;
    println!(
        "policies   {}",
        policies
            .iter()
            .map(|(n, _)| n.as_str())
            .collect::<Vec<_>>()
            .join("  ")
    );
    let status = daemon.status()?;
    for interface in status["interfaces"].as_array().into_iter().flatten() {
        let text = |key: &str| interface[key].as_str().unwrap_or("-").to_owned();
        println!(
            "attached   {:<14} {:<9} ingress {:<13} egress {}",
            text("name"),
            text("role"),
            text("ingress"),
            text("egress")
        );
    }

    style.heading("Connections");
    let rows = attempt_all(&world, &daemon)?;
    let mut different = show(&style, ATTEMPTS, &rows);
    style.heading("Connections by name, in this order");
    let by_name = attempt_in_turn(&world, &daemon, BY_NAME)?;
    different += show(&style, BY_NAME, &by_name);
    style.heading("Requests and TLS names on open ports");
    let inside = attempt_in_turn(&world, &daemon, INSIDE)?;
    different += show(&style, INSIDE, &inside);

    style.heading("Requests and answers: palisade observe --type l7 --last 32");
    print!("{}", daemon.cli(&["observe", "--type", "l7", "--last", "32"])?);
    style.heading("Dropped and audited flows: palisade observe --verdict DROPPED,AUDIT --last 12");
    print!(
        "{}",
        daemon.cli(&["observe", "--verdict", "DROPPED,AUDIT", "--last", "12"])?
    );
    if verbose {
        style.heading("The daemon's log");
        print!("{}", daemon.log());
    }
    let total = (rows.len() + by_name.len() + inside.len()) * FAMILIES.len();
    println!();
    if different == 0 {
        let ok = style.paint("32", "ok");
        println!(
            "{ok}: {total} attempts, all as the policies say, in {:.1} s",
            start.elapsed().as_secs_f64()
        );
    } else {
        let failed = style.paint("31", "FAILED");
        println!(
            "{failed}: {different} of {total} attempts came out differently\n{}",
            daemon.report()
        );
    }
    Ok(different)
}

fn draw(world: &World) -> Result<()> {
    for name in [
        "frontend",
        "backend",
        "database",
        "node",
        "internet",
        "partner",
        "partner-lab",
        "blocked",
        "resolver",
        "payments",
        "tracker",
    ] {
        let (v4, v6) = (world.addr(name, Family::V4)?, world.addr(name, Family::V6)?);
        let place = match world.topology.all().find(|w| w.name == name) {
            Some(workload) => format!("behind {} of the node", workload.interface),
            None if name == "node" => "forwards between all of them".to_owned(),
            None => "behind nic0 of the node".to_owned(),
        };
        println!("{name:<12} {:<13} {:<18} {place}", v4.to_string(), v6.to_string());
    }
    Ok(())
}

/// Prints the table. Returns the number of attempts whose outcome was not the expected one.
fn show(style: &Style, attempts: &[Attempt], rows: &[Row]) -> usize {
    let mut table =
        vec![["FROM", "TO", "PROGRAM", "EXPECTED", "IPv4", "IPv6", "DECIDED BY"].map(str::to_owned)];
    let mut as_expected = vec![[true; 2]];
    for ((from, to, program, expected), row) in attempts.iter().zip(rows) {
        let good = row
            .each_ref()
            .map(|cell| cell.verdict == *expected && !cell.deciders.is_empty());
        let cells = row.each_ref().map(|cell| {
            format!("{} {}", cell.verdict.name(), cell.measured)
                .trim_end()
                .to_owned()
        });
        let decided = row.iter().flat_map(|cell| cell.deciders.clone());
        let mut unique: Vec<String> = Vec::new();
        for name in decided {
            if !unique.contains(&name) {
                unique.push(name);
            }
        }
        if unique.is_empty() {
            unique.push("(no flow was reported)".to_owned());
        }
        let by = match program {
            Curl(port) => format!("curl :{port}"),
            Http("GET", port, path) => format!("curl :{port}{path}"),
            Http(method, port, path) => format!("curl -X {method} :{port}{path}"),
            Https(port, name) => format!("curl https://{name}:{port}"),
            Dig(name) => format!("dig {name}"),
            Ping => "ping".to_owned(),
            Iperf => "iperf3 :5201".to_owned(),
        };
        let [v4, v6] = cells;
        let expected = expected.name().to_owned();
        table.push([
            (*from).to_owned(),
            (*to).to_owned(),
            by,
            expected,
            v4,
            v6,
            unique.join(", "),
        ]);
        as_expected.push(good);
    }
    let mut widths = [0; 7];
    for row in &table {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.len());
        }
    }
    for (n, (row, good)) in table.iter().zip(&as_expected).enumerate() {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let padded = if column + 1 == row.len() {
                cell.clone()
            } else {
                format!("{cell:<width$}  ")
            };
            line.push_str(&match (n, column) {
                (0, _) => style.paint("1", &padded),
                (_, 4 | 5) if !good[column - 4] => style.paint("1;31", &padded),
                (_, 4 | 5) => style.paint(color_of(cell), &padded),
                _ => padded,
            });
        }
        println!("{line}");
    }
    as_expected.iter().flatten().filter(|good| !**good).count()
}

fn color_of(cell: &str) -> &'static str {
    match cell.split(' ').next() {
        Some("allowed") => "32",
        Some("audited") => "33",
        _ => "2",
    }
}
