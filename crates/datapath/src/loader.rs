//! The maps and the programs: found again below the pin directory, or made.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader,
    programs::{ProgramError, SchedClassifier, Xdp},
};
use palisade_abi::{
    Addr, Config, Counter, CtEntry, CtKey, Identity, Interface, IpcacheEntry, LearnedKey, PolicyEntry,
    PolicyKey, PrefixKey, RateBudget, maps as names, programs,
};

use crate::{
    MapError,
    maps::{Classes, Endpoints, Map, PerCpuArray, RawMap, possible_cpus},
    object::OBJECT,
    shares::{Shares, Sizes},
    sys::{
        SyscallError,
        bpf::{self, map_type},
    },
};

/// Magic number of a bpffs (`BPF_FS_MAGIC`).
const BPF_FS_MAGIC: libc::c_long = 0xcafe_4a11;

/// Where and how large.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory on a bpffs, `/sys/fs/bpf/palisade` by default; made if it is not there. No part may contain a dot.
    pub pin_dir: PathBuf,
    /// Sizes of the maps.
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pin_dir: PathBuf::from("/sys/fs/bpf/palisade"),
            limits: Limits::default(),
        }
    }
}

/// Sizes of the maps, in entries where nothing else is said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Connections. About 250 bytes each, allocated at once.
    pub conntrack_entries: u32,
    /// Fragmented datagrams under way.
    pub fragment_entries: u32,
    /// Entries of all policy tables together.
    pub policy_entries: u32,
    /// Full-length addresses with an identity.
    pub ipcache_entries: u32,
    /// Prefixes with an identity.
    pub prefix_entries: u32,
    /// Addresses that endpoints have learned by name.
    pub learned_entries: u32,
    /// Rules that have a counter of their own.
    pub rules: u32,
    /// Bytes of the event ring: a power of two, at least a page.
    pub event_ring_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            conntrack_entries: 262_144,
            fragment_entries: 8_192,
            policy_entries: 1_048_576,
            ipcache_entries: 262_144,
            prefix_entries: 262_144,
            learned_entries: 262_144,
            rules: 65_536,
            event_ring_bytes: 1_048_576,
        }
    }
}

impl Limits {
    fn of(&self, map: &str) -> Option<u32> {
        Some(match map {
            names::CONNTRACK => self.conntrack_entries,
            names::FRAGMENTS => self.fragment_entries,
            // Half of what they are for: see `shares`.
            names::FLOW_SLOTS => (self.conntrack_entries / 2).max(1),
            names::FRAGMENT_SLOTS => (self.fragment_entries / 2).max(1),
            names::POLICY => self.policy_entries,
            names::IPCACHE => self.ipcache_entries,
            names::PREFIXES => self.prefix_entries,
            names::LEARNED => self.learned_entries,
            names::RULES => self.rules,
            names::EVENTS => self.event_ring_bytes,
            _ => return None,
        })
    }
}

/// Why the data path could not be opened.
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
    /// bpffs takes no dots in names.
    #[error(
        "{path}: [node] pin_dir must be absolute and its parts must not contain a dot, which bpffs refuses"
    )]
    BadPinDir {
        /// The pin directory.
        path: PathBuf,
    },
    /// A directory could not be made or read.
    #[error("{path}: {source}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not allowed to use BPF.
    #[error("{source}; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")]
    NotPermitted {
        /// The call that was refused.
        #[source]
        source: SyscallError,
    },
    /// A size that no map can have.
    #[error("{map} map of size {value}: {why}")]
    BadLimit {
        /// The map, in lower case.
        map: String,
        /// The size that was asked for.
        value: u32,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A pinned map cannot be that of this program.
    #[error(
        "{path}: pinned map has {found}, this program wants {wanted}; it was made by another build: run \
         `palisade stop --detach` and start again (connections under way are then judged anew)"
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// Type, sizes and flags of the pinned map.
        found: String,
        /// Those of the object.
        wanted: String,
    },
    /// A map is to become smaller than what is in it.
    #[error(
        "{map} map of {limit} entries: the map of the running node holds {present}, and must not become smaller than that"
    )]
    TooSmall {
        /// The map, in lower case.
        map: String,
        /// The size that was asked for.
        limit: u32,
        /// Entries in the map.
        present: usize,
    },
    /// The object does not have what it should.
    #[error("the BPF object has no {what}: it was built from other sources than this program")]
    Missing {
        /// Which map or program.
        what: String,
    },
    /// A system call failed.
    #[error("{0}{hint}", hint = kernel_hint())]
    Syscall(#[from] SyscallError),
    /// A map operation failed.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The object could not be read.
    #[error("the BPF object cannot be read: {0}")]
    Parse(#[from] aya_obj::ParseError),
    /// The object could not be loaded.
    #[error("the BPF object cannot be loaded: {0}")]
    Load(#[from] aya::EbpfError),
    /// A program was refused.
    #[error("program {program}: the kernel refused it{}: {}", program_hint(), refusal(.error))]
    Program {
        /// Which one.
        program: &'static str,
        /// What the verifier says, all of it.
        error: Box<ProgramError>,
    },
}

type Result<T> = std::result::Result<T, OpenError>;

/// A loaded program.
#[derive(Debug)]
pub(crate) struct Program {
    pub name: &'static str,
    pub fd: OwnedFd,
    pub instructions: Option<u32>,
}

impl Program {
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The programs.
#[derive(Debug)]
pub(crate) struct Programs {
    pub xdp: Program,
    pub tc_ingress: Program,
    pub tc_egress: Program,
    pub punt: Program,
    pub reinject: Program,
    pub punt_filter: Program,
    pub pass: Program,
}

/// The maps and programs of a node, open.
#[derive(Debug)]
pub struct Datapath {
    pub(crate) pin_dir: PathBuf,
    pub(crate) programs: Programs,
    pub(crate) interfaces: Map<u32, Interface>,
    pub(crate) endpoints: Endpoints,
    pub(crate) ipcache: Map<Addr, IpcacheEntry>,
    pub(crate) prefixes: Map<PrefixKey, IpcacheEntry>,
    pub(crate) learned: Map<LearnedKey, Identity>,
    pub(crate) classes: Classes,
    pub(crate) policy: Map<PolicyKey, PolicyEntry>,
    pub(crate) conntrack: Map<CtKey, CtEntry>,
    pub(crate) events: RawMap,
    pub(crate) budgets: PerCpuArray<RateBudget>,
    pub(crate) counters: PerCpuArray<Counter>,
    pub(crate) rules: PerCpuArray<Counter>,
    config: Map<u32, Config>,
    pub(crate) workers: RawMap,
    pub(crate) sockets: RawMap,
    /// The conntrack map that programs attached before this one still write to, when its size was changed.
    pub(crate) old_conntrack: Option<Map<CtKey, CtEntry>>,
    pub(crate) shares: Shares,
    pub(crate) sizes: Sizes,
    fresh: bool,
    resized: Vec<String>,
}

impl Datapath {
    /// Finds or makes the maps, and loads the programs. Attaches nothing and changes nothing that is attached.
    ///
    /// A pinned map of the right layout but another size is made anew and its content copied; what is attached
    /// goes on with the old one until [`Self::attach`].
    ///
    /// # Errors
    /// What is attached stays as it is.
    pub fn open(options: &Options) -> Result<Self> {
        check_limits(&options.limits)?;
        check_pin_dir(&options.pin_dir)?;
        let map_dir = version_dir(&options.pin_dir);
        make_dir(&map_dir)?;
        lift_memlock();

        let object = aya_obj::Object::parse(OBJECT)?;
        let mut maps = BTreeMap::new();
        let mut resized = Vec::new();
        let mut old_conntrack = None;
        let mut fresh = true;
        for (name, definition) in &object.maps {
            if !matches!(
                definition.section_kind(),
                aya_obj::EbpfSectionKind::Maps | aya_obj::EbpfSectionKind::BtfMaps
            ) {
                continue;
            }
            let wanted = Wanted::new(name, definition, &options.limits);
            let (map, history) = wanted.provide(&map_dir)?;
            match history {
                History::Made => {}
                History::Found => fresh = false,
                History::Resized(old) => {
                    fresh = false;
                    // The slots go with the maps that they are for.
                    if !matches!(name.as_str(), names::FLOW_SLOTS | names::FRAGMENT_SLOTS) {
                        resized.push(name.clone());
                    }
                    if name == names::CONNTRACK {
                        old_conntrack = Some(Map::new(old)?);
                    }
                }
            }
            maps.insert(name.clone(), map);
        }

        let programs = load_programs(&map_dir, &maps)?;
        let mut take = |name: &str| {
            maps.remove(name).ok_or_else(|| OpenError::Missing {
                what: format!("map {name}"),
            })
        };
        let classes = take(names::CLASSES)?;
        let shares = Shares::new(&take(names::SHARES)?)?;
        let conntrack = take(names::CONNTRACK)?;
        let sizes = Sizes {
            flows: conntrack.info.max_entries,
            flow_table: take(names::FLOW_SLOTS)?.info.max_entries,
            fragment_table: take(names::FRAGMENT_SLOTS)?.info.max_entries,
            cpus: u32::try_from(possible_cpus()?).unwrap_or(u32::MAX),
        };
        let datapath = Self {
            pin_dir: options.pin_dir.clone(),
            programs,
            interfaces: Map::new(take(names::INTERFACES)?)?,
            endpoints: Endpoints::new(take(names::ENDPOINTS)?)?,
            ipcache: Map::new(take(names::IPCACHE)?)?,
            prefixes: Map::new(take(names::PREFIXES)?)?,
            learned: Map::new(take(names::LEARNED)?)?,
            classes: Classes::new(&classes)?,
            policy: Map::new(take(names::POLICY)?)?,
            conntrack: Map::new(conntrack)?,
            events: take(names::EVENTS)?,
            budgets: PerCpuArray::new(take(names::BUDGETS)?)?,
            counters: PerCpuArray::new(take(names::COUNTERS)?)?,
            rules: PerCpuArray::new(take(names::RULES)?)?,
            config: Map::new(take(names::CONFIG)?)?,
            workers: take(names::WORKERS)?,
            sockets: take(names::XSKS)?,
            old_conntrack,
            shares,
            sizes,
            fresh,
            resized,
        };
        // Sizes may have changed since the maps were made.
        datapath.share_out(&[], false);
        Ok(datapath)
    }

    /// Whether no map was found: nothing was attached by this version before, or everything was detached.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Maps that were made anew because their sizes in the configuration changed.
    #[must_use]
    pub fn resized(&self) -> &[String] {
        &self.resized
    }

    /// Tells the programs their timeouts, limits and fixed identities.
    ///
    /// # Errors
    /// If the map refuses.
    pub fn set_config(&self, config: &Config) -> std::result::Result<(), MapError> {
        self.config.insert(&0, config)
    }

    /// What the programs are told; all zero before the first [`Self::set_config`].
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn config(&self) -> std::result::Result<Option<Config>, MapError> {
        self.config.get(&0)
    }

    /// Instructions that the verifier walked for each program; empty before Linux 5.16.
    #[must_use]
    pub fn verified_instructions(&self) -> Vec<(&'static str, u32)> {
        let Programs {
            xdp,
            tc_ingress,
            tc_egress,
            punt,
            reinject,
            punt_filter,
            pass,
        } = &self.programs;
        [xdp, tc_ingress, tc_egress, punt, reinject, punt_filter, pass]
            .into_iter()
            .filter_map(|p| Some((p.name, p.instructions?)))
            .collect()
    }

    /// The file descriptor of a program by its name in [`palisade_abi::programs`], for test runs.
    #[must_use]
    pub fn program(&self, name: &str) -> Option<BorrowedFd<'_>> {
        let Programs {
            xdp,
            tc_ingress,
            tc_egress,
            punt,
            reinject,
            punt_filter,
            pass,
        } = &self.programs;
        [xdp, tc_ingress, tc_egress, punt, reinject, punt_filter, pass]
            .into_iter()
            .find(|p| p.name == name)
            .map(Program::fd)
    }

    /// Removes the maps of other versions of the layout. To be called once every interface has been attached by
    /// this version.
    ///
    /// # Errors
    /// If a directory cannot be read or removed.
    pub fn retire_other_versions(&self) -> Result<()> {
        let own = version_dir(&self.pin_dir);
        for dir in version_dirs(&self.pin_dir)? {
            if dir != own {
                remove_dir_of_pins(&dir)?;
            }
        }
        Ok(())
    }
}

/// Where the maps of this version are pinned.
fn version_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join(format!("v{}", palisade_abi::VERSION))
}

/// Every directory `v<number>` of a pin directory.
pub(crate) fn version_dirs(pin_dir: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| OpenError::Io {
        path: pin_dir.to_owned(),
        source,
    };
    let mut dirs = Vec::new();
    let entries = match fs::read_dir(pin_dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(dirs),
        other => other.map_err(io)?,
    };
    for entry in entries {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name
            .strip_prefix('v')
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        {
            dirs.push(path);
        }
    }
    Ok(dirs)
}

/// Removes a directory that contains pins only.
pub(crate) fn remove_dir_of_pins(dir: &Path) -> Result<()> {
    let io = |source| OpenError::Io {
        path: dir.to_owned(),
        source,
    };
    for entry in fs::read_dir(dir).map_err(io)? {
        fs::remove_file(entry.map_err(io)?.path()).map_err(io)?;
    }
    fs::remove_dir(dir).map_err(io)
}

pub(crate) fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o700)))
        .map_err(|source| OpenError::Io {
            path: path.to_owned(),
            source,
        })
}

fn check_limits(limits: &Limits) -> Result<()> {
    let bad = |map: &str, value, why| {
        let map = map.to_lowercase();
        Err(OpenError::BadLimit { map, value, why })
    };
    for map in [
        names::CONNTRACK,
        names::FRAGMENTS,
        names::POLICY,
        names::IPCACHE,
        names::PREFIXES,
        names::LEARNED,
        names::RULES,
    ] {
        let value = limits.of(map).unwrap_or(1);
        if value == 0 {
            return bad(map, value, "a map has at least one entry");
        }
        if value > 1 << 28 {
            return bad(map, value, "at most 268435456");
        }
    }
    let ring = limits.event_ring_bytes;
    // SAFETY: no pointers.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    if !ring.is_power_of_two() || i64::from(ring) < page {
        return bad(names::EVENTS, ring, "a power of two of at least a page (4096)");
    }
    Ok(())
}

/// The part of a path that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"))
}

/// Whether a path, or what of it exists, is on a bpffs.
pub(crate) fn is_on_bpffs(path: &Path) -> io::Result<bool> {
    use std::os::unix::ffi::OsStrExt as _;
    let c_path = std::ffi::CString::new(existing(path).as_os_str().as_bytes())?;
    // SAFETY: all zero is a value of the plain struct.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    if unsafe { libc::statfs(c_path.as_ptr(), &mut stat) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_type as libc::c_long == BPF_FS_MAGIC)
}

/// Whether pins can be made in a directory, which need not be there yet.
///
/// # Errors
/// It is not on a bpffs, or its name is one that bpffs refuses.
pub fn check_pin_dir(pin_dir: &Path) -> Result<()> {
    // Dots are refused in what is made on the bpffs; the mount itself may be anywhere.
    let dots = |p: &Path| p.to_str().is_none_or(|p| p.contains('.'));
    let to_be_made = pin_dir.strip_prefix(existing(pin_dir)).unwrap_or(pin_dir);
    if !pin_dir.is_absolute() || dots(to_be_made) {
        return Err(OpenError::BadPinDir {
            path: pin_dir.to_owned(),
        });
    }
    match is_on_bpffs(pin_dir) {
        Ok(true) => Ok(()),
        Ok(false) => Err(OpenError::NotBpffs {
            path: pin_dir.to_owned(),
        }),
        Err(source) => Err(OpenError::Io {
            path: pin_dir.to_owned(),
            source,
        }),
    }
}

/// Why a program was refused: the verifier's reason stands at the end of its log, which may have a million lines.
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

/// Releases on which these programs have been run (README, "Requirements").
const TESTED: &str = "6.1, 6.12, 6.16 and 6.18";

/// The release of the running kernel.
pub(crate) fn kernel_release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

/// What a refusal of maps and programs may come from.
fn kernel_hint() -> String {
    let release = kernel_release();
    if is_too_old(&release) {
        format!("; Linux {release} is older than the 6.1 that Palisade needs")
    } else {
        String::new()
    }
}

/// Which kernel refuses a program, and which are known to take it.
fn program_hint() -> String {
    let release = kernel_release();
    if is_too_old(&release) {
        kernel_hint()
    } else {
        format!(" (Linux {release}; tested are {TESTED})")
    }
}

impl OpenError {
    /// Returns the map that has to be larger than asked for, if that is the cause.
    #[must_use]
    pub fn too_small(&self) -> Option<&str> {
        match self {
            Self::TooSmall { map, .. } => Some(map),
            Self::Map(error) => error.too_small(),
            _ => None,
        }
    }

    /// The verifier's log, all of it, if the verifier refused a program. It may have many megabytes.
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

/// Before Linux 5.11 maps count against this limit, which is 64 kB by default. Later it has no effect; a refusal
/// shows when a map is made.
fn lift_memlock() {
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the struct is valid for the call.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) };
}

/// A map as it should be.
struct Wanted {
    name: String,
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// Where a map came from.
enum History {
    Made,
    Found,
    Resized(RawMap),
}

impl Wanted {
    fn new(name: &str, definition: &aya_obj::Map, limits: &Limits) -> Self {
        let map_type = definition.map_type();
        // The definition of a ring names the record for programs; the kernel wants no sizes.
        let sized = map_type != map_type::RINGBUF;
        Self {
            name: name.to_owned(),
            map_type,
            key_size: if sized { definition.key_size() } else { 0 },
            value_size: if sized { definition.value_size() } else { 0 },
            max_entries: limits.of(name).unwrap_or(definition.max_entries()),
            flags: definition.map_flags(),
        }
    }

    fn provide(&self, dir: &Path) -> Result<(RawMap, History)> {
        let path = dir.join(&self.name);
        let Some(fd) = bpf::get_pinned(&path).map_err(permission)? else {
            let map = self.create()?;
            bpf::pin(map.fd.as_fd(), &path)?;
            return Ok((map, History::Made));
        };
        let pinned = RawMap::new(&self.name, fd)?;
        let layout = |map_type, key_size, value_size, flags| {
            format!(
                "{}, keys of {key_size}, values of {value_size} bytes, flags {flags:#x}",
                map_type::name(map_type)
            )
        };
        let info = &pinned.info;
        let found = layout(info.map_type, info.key_size, info.value_size, info.map_flags);
        let wanted = layout(self.map_type, self.key_size, self.value_size, self.flags);
        if found != wanted {
            return Err(OpenError::Layout { path, found, wanted });
        }
        if info.max_entries == self.max_entries {
            return Ok((pinned, History::Found));
        }
        let map = self.create()?;
        self.migrate(&pinned, &map)?;
        // The new map takes the name in one step; nobody can open half a set.
        let staged = dir.join(format!("{}_new", self.name));
        let io = |source| OpenError::Io {
            path: staged.clone(),
            source,
        };
        match fs::remove_file(&staged) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io(e)),
            _ => {}
        }
        bpf::pin(map.fd.as_fd(), &staged)?;
        fs::rename(&staged, &path).map_err(io)?;
        Ok((map, History::Resized(pinned)))
    }

    fn create(&self) -> Result<RawMap> {
        let fd = bpf::map_create(
            &self.name,
            self.map_type,
            self.key_size,
            self.value_size,
            self.max_entries,
            self.flags,
        )
        .map_err(permission)?;
        Ok(RawMap::new(&self.name, fd)?)
    }

    /// Copies what fits. What must not be lost, and does not fit, is an error.
    fn migrate(&self, from: &RawMap, to: &RawMap) -> Result<()> {
        if self.map_type == map_type::RINGBUF {
            return Ok(());
        }
        let keeps_all = matches!(self.map_type, map_type::HASH | map_type::LPM_TRIE);
        if keeps_all && self.max_entries < from.info.max_entries {
            let present = from.count()?;
            if present > self.max_entries as usize {
                return Err(OpenError::TooSmall {
                    map: self.name.to_lowercase(),
                    limit: self.max_entries,
                    present,
                });
            }
        }
        let is_array = matches!(self.map_type, map_type::ARRAY | map_type::PERCPU_ARRAY);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        from.for_each(|key, value| {
            let beyond = is_array
                && key
                    .try_into()
                    .is_ok_and(|k| u32::from_ne_bytes(k) >= self.max_entries);
            if !beyond {
                keys.extend_from_slice(key);
                values.extend_from_slice(value);
            }
        })?;
        to.update_all(&keys, &values).map_err(|(_, e)| to.error(e))?;
        Ok(())
    }
}

fn permission(source: SyscallError) -> OpenError {
    if source.errno() == libc::EPERM || source.errno() == libc::EACCES {
        OpenError::NotPermitted { source }
    } else {
        OpenError::Syscall(source)
    }
}

fn load_programs(map_dir: &Path, maps: &BTreeMap<String, RawMap>) -> Result<Programs> {
    let mut loader = EbpfLoader::new();
    for (name, map) in maps {
        loader
            .map_pin_path(name, map_dir.join(name))
            .map_max_entries(name, map.info.max_entries);
    }
    let mut ebpf = loader.load(OBJECT)?;
    // Most of the time goes to the verifier, which works on one thread for each program.
    let mut loaded = BTreeMap::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> = ebpf
            .programs_mut()
            .filter_map(|(name, program)| {
                let name = PROGRAMS.into_iter().find(|known| *known == name)?;
                Some(scope.spawn(move || load_program(name, program)))
            })
            .collect();
        for thread in threads {
            let program = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            loaded.insert(program.name, program);
        }
        Ok::<_, OpenError>(())
    })?;
    let mut take = |name: &'static str| {
        loaded.remove(name).ok_or_else(|| OpenError::Missing {
            what: format!("program {name}"),
        })
    };
    Ok(Programs {
        xdp: take(programs::XDP_INGRESS)?,
        tc_ingress: take(programs::TC_INGRESS)?,
        tc_egress: take(programs::TC_EGRESS)?,
        punt: take(programs::PUNT)?,
        reinject: take(programs::REINJECT)?,
        punt_filter: take(programs::PUNT_FILTER)?,
        pass: take(programs::PASS)?,
    })
}

const PROGRAMS: [&str; 7] = [
    programs::XDP_INGRESS,
    programs::TC_INGRESS,
    programs::TC_EGRESS,
    programs::PUNT,
    programs::REINJECT,
    programs::PUNT_FILTER,
    programs::PASS,
];

fn load_program(name: &'static str, program: &mut aya::programs::Program) -> Result<Program> {
    let refused = |error| OpenError::Program {
        program: name,
        error: Box::new(error),
    };
    if matches!(name, programs::XDP_INGRESS | programs::PUNT | programs::PASS) {
        let xdp: &mut Xdp = program.try_into().map_err(refused)?;
        xdp.load().map_err(refused)?;
    } else {
        let classifier: &mut SchedClassifier = program.try_into().map_err(refused)?;
        classifier.load().map_err(refused)?;
    }
    let instructions = program
        .info()
        .ok()
        .and_then(|info| info.verified_instruction_count());
    let fd = bpf::duplicate(program.fd().map_err(refused)?)?;
    Ok(Program {
        name,
        fd,
        instructions,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_no_map_can_have_are_named() {
        let error = |limits| check_limits(&limits).unwrap_err().to_string();
        let ring = Limits {
            event_ring_bytes: 5000,
            ..Limits::default()
        };
        assert!(
            error(ring).starts_with("events map of size 5000: a power of two"),
            "{}",
            error(ring)
        );
        let none = Limits {
            policy_entries: 0,
            ..Limits::default()
        };
        assert!(error(none).starts_with("policy map of size 0"));
        check_limits(&Limits::default()).unwrap();
    }

    #[test]
    fn a_pin_directory_elsewhere_is_refused_with_the_fix() {
        let error = check_pin_dir(Path::new("/tmp/palisade")).unwrap_err().to_string();
        assert!(error.contains("mount -t bpf"), "{error}");
        for bad in [
            "relative/dir",
            "/sys/fs/bpf/pali.sade",
            "/sys/fs/bpf/palisade/../x",
        ] {
            assert!(
                matches!(check_pin_dir(Path::new(bad)), Err(OpenError::BadPinDir { .. })),
                "{bad}"
            );
        }
    }

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
        // The message has the end of the log; all of it is there to be kept.
        assert!(said.lines().count() < 20, "{said}");
        assert_eq!(error.verifier_log().as_deref(), Some(log.as_str()));
        let other = OpenError::Syscall(SyscallError {
            call: "bpf".into(),
            io_error: std::io::Error::from_raw_os_error(libc::EPERM),
        });
        assert_eq!(other.verifier_log(), None);
    }

    #[test]
    fn every_endpoint_and_every_interface_has_a_slot() {
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        for name in [names::ENDPOINTS, names::INTERFACES] {
            assert_eq!(object.maps[name].max_entries(), 1 << 16, "{name}");
        }
    }

    #[test]
    fn the_default_limits_are_those_of_the_object() {
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        for (name, definition) in &object.maps {
            if let Some(limit) = Limits::default().of(name) {
                assert_eq!(limit, definition.max_entries(), "{name}");
            }
        }
    }
}
