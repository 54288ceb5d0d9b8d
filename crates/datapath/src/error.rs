//! Errors of [`Datapath::open`](crate::Datapath::open).

use std::{io, path::PathBuf};

use aya::programs::ProgramError;

use crate::{
    MapError,
    sys::{SyscallError, kernel_release},
};

/// Error of opening the data path.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The pin directory is not on a bpffs.
    #[error(
        "{path}: not on a bpffs; mount one with `mount -t bpf bpf /sys/fs/bpf` and set [node] pin_dir to a \
         directory on it (`ip netns exec` hides it: use `nsenter --net=`)"
    )]
    NotBpffs {
        /// The pin directory.
        path: PathBuf,
    },
    /// The path is relative, or a part of it that does not exist yet has a dot, which bpffs refuses in names.
    #[error(
        "{path}: [node] pin_dir must be absolute and its parts must not contain a dot, which bpffs refuses"
    )]
    BadPinDir {
        /// The pin directory.
        path: PathBuf,
    },
    /// A directory or pin could not be created, read or removed.
    #[error("{path}: {source}")]
    Io {
        /// Directory or pin.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The process lacks the capabilities for BPF.
    #[error("{source}; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")]
    NotPermitted {
        /// Refused system call.
        #[source]
        source: SyscallError,
    },
    /// A configured size is not possible for the map.
    #[error("{map} map of size {value}: {why}")]
    BadLimit {
        /// Name of the map, in lower case.
        map: String,
        /// Configured size, entries or bytes.
        value: u32,
        /// Reason why the size is not possible.
        why: &'static str,
    },
    /// The layout of a pinned map differs from that of the map in the BPF object.
    #[error(
        "{path}: pinned map has {found}, this program wants {wanted}; it was made by another build: run \
         `palisade stop --detach` and start again (policies are then evaluated again for open connections)"
    )]
    Layout {
        /// Path of the pin.
        path: PathBuf,
        /// Type, sizes and flags of the pinned map.
        found: String,
        /// Type, sizes and flags of the map in the BPF object.
        wanted: String,
    },
    /// There are maps of a later version.
    #[error(
        "{path}: maps of a later version of Palisade ({version}, this program has {}); its programs are attached, and the \
         last policy stays enforced: start the later version again, or end all enforcement with `palisade stop --detach` \
         before this version is started",
        palisade_abi::VERSION
    )]
    Newer {
        /// Directory of the maps.
        path: PathBuf,
        /// The later version.
        version: u32,
    },
    /// A resized map would not hold the entries of the present map.
    #[error(
        "{map} map of {limit} entries: the map of the running node holds {present} entries, and the new size must not be smaller"
    )]
    TooSmall {
        /// Name of the map, in lower case.
        map: String,
        /// Configured size, entries or bytes.
        limit: u32,
        /// Number of entries in the present map.
        present: usize,
    },
    /// A map or program is missing in the BPF object.
    #[error("the BPF object has no {what}: it was built from other sources than this program")]
    Missing {
        /// Name of the map or program.
        what: String,
    },
    /// A system call failed.
    #[error("{0}{hint}", hint = kernel_hint())]
    Syscall(#[from] SyscallError),
    /// A map operation failed.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The BPF object could not be parsed.
    #[error("the BPF object cannot be read: {0}")]
    Parse(#[from] aya_obj::ParseError),
    /// The BPF object could not be loaded.
    #[error("the BPF object cannot be loaded: {0}")]
    Load(#[from] aya::EbpfError),
    /// The kernel refused a program.
    #[error("program {program}: the kernel refused it{}: {}", program_hint(), refusal(.error))]
    Program {
        /// Name of the program.
        program: &'static str,
        /// Error of the load, with the complete verifier log.
        error: Box<ProgramError>,
    },
}

/// Returns a hint for the error text if the kernel is older than the required release.
fn kernel_hint() -> String {
    let release = kernel_release();
    if is_too_old(&release) {
        format!("; Linux {release} is older than the 6.1 that Palisade needs")
    } else {
        String::new()
    }
}

/// Returns a hint for the error text: that the kernel is too old, or else its release and the tested releases.
fn program_hint() -> String {
    let release = kernel_release();
    if is_too_old(&release) {
        kernel_hint()
    } else {
        format!(" (Linux {release}; tested are {TESTED})")
    }
}

/// Returns the error of the load with the last lines of the verifier log. The verifier writes the reason last, and the
/// log can have a million lines.
fn refusal(error: &ProgramError) -> String {
    const LINES: usize = 12;
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return error.to_string();
    };
    let log = verifier_log.to_string();
    let lines: Vec<_> = log.lines().collect();
    format!(
        "{io_error}\n{}",
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    )
}

/// Kernel releases on which the programs have been tested (docs/OPERATIONS.md, "Limits").
const TESTED: &str = "6.1, 6.12, 6.16, 6.18 and 7.3";

impl OpenError {
    /// Returns the map whose configured size is too small; `None` if the error has another cause.
    #[must_use]
    pub fn too_small(&self) -> Option<&str> {
        match self {
            Self::TooSmall { map, .. } => Some(map),
            Self::Map(error) => error.too_small(),
            _ => None,
        }
    }

    /// Returns the complete verifier log, up to several MB, if the verifier refused a program.
    #[must_use]
    pub fn verifier_log(&self) -> Option<String> {
        match self {
            Self::Program { error, .. } => match &**error {
                ProgramError::LoadError { verifier_log, .. } => Some(verifier_log.to_string()),
                _ => None,
            },
            _ => None,
        }
    }
}

fn is_too_old(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < (6, 1)
}

pub(crate) fn permission(source: SyscallError) -> OpenError {
    if source.errno() == libc::EPERM || source.errno() == libc::EACCES {
        OpenError::NotPermitted { source }
    } else {
        OpenError::Syscall(source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_known_by_their_release() {
        for (release, old) in [
            ("5.15.0-91-generic", true),
            ("6.0.19", true),
            ("6.1.0-13-amd64", false),
            ("6.18.44", false),
            ("7.0", false),
        ] {
            assert_eq!(is_too_old(release), old, "{release}");
        }
    }

    #[test]
    fn a_refused_program_is_named_with_the_end_of_the_verifiers_log_and_the_kernel() {
        let log: String = (0..5_000).map(|n| format!("{n}: (bf) r1 = r2\n")).collect();
        let log = log + "R1 invalid mem access 'scalar'\nprocessed 5000 insns\n";
        let error = OpenError::Program {
            program: "palisade_in",
            error: Box::new(ProgramError::LoadError {
                io_error: std::io::Error::from_raw_os_error(libc::EACCES),
                verifier_log: aya_obj::VerifierLog::new(log.clone()),
            }),
        };
        let said = error.to_string();
        for part in [
            "program palisade_in: the kernel refused it",
            kernel_release().as_str(),
            "Permission denied",
            "R1 invalid mem access 'scalar'\nprocessed 5000 insns",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        // The message has only the end of the log; `verifier_log` returns the complete log.
        assert!(said.lines().count() < 20, "{said}");
        assert_eq!(error.verifier_log().as_deref(), Some(log.as_str()));
        let other = OpenError::Syscall(SyscallError {
            call: "bpf".into(),
            io_error: std::io::Error::from_raw_os_error(libc::EPERM),
        });
        assert_eq!(other.verifier_log(), None);
    }
}
