//! Arguments of `palisade capture`.

use std::{path::PathBuf, time::Duration};

use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, error::ErrorKind, value_parser};
use palisade_abi::MAX_CAPTURED;
use palisade_flowlog::{duration, filter::FLAGS};

/// Examples of `palisade capture`.
pub(crate) const CAPTURE_HELP: &str = "\
Examples:
  palisade capture -w drops.pcapng --verdict dropped --duration 1m
  palisade capture -w - --ip 10.0.1.10 --port 80 --snaplen 1500 | wireshark -k -i -
  palisade capture -w ring.pcapng --ring-files 10 --ring-bytes 10M --duration 24h --interface eth0

Filters are those of `palisade observe`, except --since, --until and --uuid. Without --snaplen only headers are
written, no payload.";

/// Longest capture. The daemon has the same limit.
const MAX_DURATION: Duration = Duration::from_secs(24 * 3600);

/// Arguments of `palisade capture`. The filters are those of `palisade observe` that select packets.
#[derive(Clone, Debug, Default)]
pub(crate) struct CaptureArgs {
    /// Filters and their values, in the order of the command line.
    pub filters: Vec<(String, String)>,
    /// File; `-` for standard output.
    pub write: PathBuf,
    /// Whether an existing file is replaced.
    pub force: bool,
    /// Bytes of each packet; `None` for headers only.
    pub snap_length: Option<u32>,
    /// Number of packets after which the capture ends.
    pub count: Option<u64>,
    /// Number of bytes after which the capture ends.
    pub max_bytes: Option<u64>,
    /// Time after which the capture ends.
    pub duration: Option<Duration>,
    /// Number and length of the files of a ring.
    pub ring: Option<(usize, u64)>,
}

impl FromArgMatches for CaptureArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
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
        // These select flows that are recorded, and none of them has a packet.
        if let Some((_, flag, _)) = filters
            .iter()
            .find(|(_, flag, _)| matches!(flag.as_str(), "since" | "until" | "uuid"))
        {
            return Err(clap::Error::raw(
                ErrorKind::ArgumentConflict,
                format!("--{flag} selects recorded flows; a capture begins now, and --duration ends it\n"),
            ));
        }
        let ring = match (matches.get_one("ring-files"), matches.get_one("ring-bytes")) {
            (Some(files), Some(bytes)) => Some((*files, *bytes)),
            _ => None,
        };
        Ok(Self {
            filters: filters
                .into_iter()
                .map(|(_, flag, value)| (flag, value))
                .collect(),
            write: matches.get_one::<PathBuf>("write").cloned().unwrap_or_default(),
            force: matches.get_flag("force"),
            snap_length: matches.get_one("snaplen").copied(),
            count: matches.get_one("count").copied(),
            max_bytes: matches.get_one("max-bytes").copied(),
            duration: matches.get_one("duration").copied(),
            ring,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for CaptureArgs {
    fn augment_args(mut command: clap::Command) -> clap::Command {
        let option = |name: &'static str, value: &'static str, help: &'static str| {
            Arg::new(name).long(name).value_name(value).help(help)
        };
        command = command
            .arg(
                option(
                    "write",
                    "FILE",
                    "File to write, in the pcapng format; - for standard output",
                )
                .short('w')
                .required(true)
                .value_parser(value_parser!(PathBuf)),
            )
            .arg(
                Arg::new("force")
                    .long("force")
                    .action(ArgAction::SetTrue)
                    .help("Replace a file that exists"),
            )
            .arg(
                option(
                    "snaplen",
                    "BYTES",
                    "Write at most this many bytes of each packet, payload included [default: headers only]",
                )
                .value_parser(value_parser!(u32).range(1..=i64::from(MAX_CAPTURED))),
            )
            .arg(
                option("count", "PACKETS", "End after this many packets")
                    .value_parser(value_parser!(u64).range(1..)),
            )
            .arg(
                option(
                    "max-bytes",
                    "BYTES",
                    "End before the file gets longer (10M) [default: 100M, or none with --ring-files]",
                )
                .value_parser(bytes),
            )
            .arg(
                option(
                    "duration",
                    "DURATION",
                    "End after this time, at most 24h [default: 10m]",
                )
                .value_parser(time),
            )
            .arg(
                option(
                    "ring-files",
                    "FILES",
                    "Write NAME_00001.EXT and so on, and keep only this many files, the newest",
                )
                .requires("ring-bytes")
                .value_parser(files),
            )
            .arg(
                option("ring-bytes", "BYTES", "Length of each file of the ring (10M)")
                    .requires("ring-files")
                    .value_parser(bytes),
            );
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

/// Parses a number of bytes with an optional unit of powers of 1,000: `500k`, `10M`, `2G`.
fn bytes(text: &str) -> Result<u64, String> {
    let malformed = || format!("'{text}' is not a number of bytes: write 4096, 500k, 10M or 2G");
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&text[..at], 1_000),
        Some((at, 'M')) => (&text[..at], 1_000_000),
        Some((at, 'G')) => (&text[..at], 1_000_000_000),
        _ => (text, 1),
    };
    let number: u64 = number.parse().map_err(|_| malformed())?;
    let bytes = number
        .checked_mul(unit)
        .ok_or_else(|| format!("'{text}' is too large"))?;
    if bytes < 4096 {
        return Err(format!(
            "{bytes} bytes hold no packet with its description; at least 4096 are needed"
        ));
    }
    Ok(bytes)
}

/// Parses the duration of a capture.
fn time(text: &str) -> Result<Duration, String> {
    match duration::parse(text) {
        Ok(time) if time.is_zero() || time > MAX_DURATION => Err(format!("'{text}' is not a time up to 24h")),
        other => other.map_err(|error| error.to_string()),
    }
}

/// Parses the number of files of a ring.
fn files(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 2..=10_000) => Ok(number),
        _ => Err(format!("'{text}' is not a number from 2 to 10000")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parse(args: &[&str]) -> Result<CaptureArgs, clap::Error> {
        let all = ["palisade", "capture"].iter().chain(args);
        let Command::Capture(args) = Cli::try_parse_from(all)?.command else {
            panic!("another command");
        };
        Ok(*args)
    }

    #[test]
    fn filters_and_bounds_are_parsed() {
        let args = parse(&[
            "-w",
            "a.pcapng",
            "--verdict",
            "dropped",
            "--not",
            "--ip",
            "10.0.0.1",
            "--snaplen",
            "256",
            "--count",
            "10",
            "--duration",
            "1m30s",
            "--ring-files",
            "3",
            "--ring-bytes",
            "10M",
        ])
        .unwrap();
        assert_eq!(args.filters.len(), 3);
        assert_eq!(args.filters[1].0, "not");
        assert_eq!(args.snap_length, Some(256));
        assert_eq!(args.count, Some(10));
        assert_eq!(args.duration, Some(Duration::from_secs(90)));
        assert_eq!(args.ring, Some((3, 10_000_000)));
    }

    #[test]
    fn wrong_arguments_are_refused() {
        for (wrong, why) in [
            (&[][..], "--write"),
            (&["-w", "a", "--snaplen", "0"], "--snaplen"),
            (&["-w", "a", "--ring-files", "3"], "--ring-bytes"),
            (&["-w", "a", "--max-bytes", "10 MB"], "10M"),
            (&["-w", "a", "--max-bytes", "99999999999G"], "too large"),
            (&["-w", "a", "--max-bytes", "1"], "4096"),
            (
                &["-w", "a", "--ring-files", "1", "--ring-bytes", "1M"],
                "2 to 10000",
            ),
            (&["-w", "a", "--since", "5m"], "--duration"),
            (&["-w", "a", "--duration", "25h"], "24h"),
            (&["-w", "a", "--duration", "0s"], "24h"),
        ] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains(why), "{wrong:?}: {error}");
        }
    }
}
