//! Opening of the data path: pinned maps are reused or created, and the programs are loaded.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::AtomicU64},
};

use palisade_abi::{
    Addr, Config, Counter, CtEntry, CtKey, Identity, Interface, IpcacheEntry, LearnedKey, PolicyEntry,
    PolicyKey, PrefixKey, RateBudget, maps as names,
};

use crate::{
    Limits, MapError, OpenError, Options,
    error::permission,
    maps::{Classes, Endpoints, Map, PerCpuArray, RawMap, possible_cpus},
    object::OBJECT,
    options::check_limits,
    pin::{check_pin_dir, make_dir, remove_dir_of_pins, taken_until, version_dir, version_dirs},
    programs::{Program, Programs, VerdictPrograms, load_programs},
    shares::{self, Shares, Sizes},
    sys::bpf::{self, map_type},
    upgrade::{OldConntrack, Pinned, copy_from_earlier, earlier_flows},
};

type Result<T> = std::result::Result<T, OpenError>;

/// Maps and programs of a node.
#[derive(Debug)]
pub struct Datapath {
    pub(crate) pin_dir: PathBuf,
    pub(crate) programs: Programs,
    /// Programs of the capture that runs.
    pub(crate) capture: Mutex<Option<Arc<VerdictPrograms>>>,
    /// Error of the last replacement of the programs at the begin or end of a capture; `None` if it succeeded.
    pub(crate) replacement_problem: Mutex<Option<String>>,
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
    pub(crate) listeners: RawMap,
    /// Pinned conntrack maps of another size and of an earlier version. Programs that were attached before write to them
    /// until their interface is attached again.
    pub(crate) old_conntrack: Mutex<Vec<OldConntrack>>,
    /// Whether the directory of the maps is still to be renamed, see [`Datapath::commit`].
    pub(crate) staged: Mutex<bool>,
    /// Earlier version whose maps existed at the start.
    pub(crate) earlier: Option<u32>,
    /// Number of removals of flows by this process, for [`crate::ProxiedFlows::removals`].
    pub(crate) removals: Arc<AtomicU64>,
    pub(crate) shares: Shares,
    pub(crate) sizes: Sizes,
    fresh: bool,
    resized: Vec<String>,
}

impl Datapath {
    /// Opens the pinned maps or creates them, and loads the programs. Attached programs are not replaced.
    ///
    /// A pinned map with the right layout but another size is replaced by a copy of the new size. Programs that are
    /// attached use the old map until [`Self::attach`]. New maps are found by a later process only after
    /// [`Self::commit`]; beside maps of an earlier version, see [`Self::take_over_flows`].
    ///
    /// # Errors
    /// [`OpenError`]. Attached programs stay attached.
    pub fn open(options: &Options) -> Result<Self> {
        check_limits(&options.limits)?;
        check_pin_dir(&options.pin_dir)?;
        let Pinned {
            map_dir,
            staged,
            earlier,
        } = Pinned::find(&options.pin_dir)?;
        make_dir(&map_dir)?;
        lift_memlock();

        let object = aya_obj::Object::parse(OBJECT)?;
        let mut maps = BTreeMap::new();
        let mut resized = Vec::new();
        let mut old_conntrack = Vec::new();
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
                    // The slot maps are not reported, since their sizes follow from the sizes of CONNTRACK and
                    // FRAGMENTS.
                    if !matches!(name.as_str(), names::FLOW_SLOTS | names::FRAGMENT_SLOTS) {
                        resized.push(name.clone());
                    }
                    if name == names::CONNTRACK {
                        old_conntrack.push(OldConntrack::resized(Map::new(old)?));
                    }
                }
            }
            if staged && let Some(version) = earlier {
                copy_from_earlier(&options.pin_dir, version, &map)?;
            }
            maps.insert(name.clone(), map);
        }

        // After a crash in the middle of an upgrade and a change of the size, there are both: some interfaces have programs
        // of this version, others those of the earlier one.
        if let Some(version) = earlier
            && let Some(mut flows) = earlier_flows(&options.pin_dir, version)?
        {
            flows.taken_until = taken_until(&map_dir);
            old_conntrack.push(flows);
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
            capture: Mutex::default(),
            replacement_problem: Mutex::default(),
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
            listeners: take(names::PROXY_LISTENERS)?,
            old_conntrack: Mutex::new(old_conntrack),
            staged: Mutex::new(staged),
            earlier,
            removals: Arc::default(),
            shares,
            sizes,
            fresh,
            resized,
        };
        // The pinned shares were computed by an earlier process, whose maps can have had other sizes.
        let endpoints = datapath.endpoints.with_policy();
        datapath.shares.cut(&shares::shares(&endpoints, datapath.sizes));
        Ok(datapath)
    }

    /// Returns whether no pinned map of this version existed before [`Self::open`]: this version has attached no
    /// program before, or everything was detached. Programs of an earlier version ([`Self::earlier_version`]) can be
    /// attached.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Returns the names of the maps that were replaced because their configured size has changed.
    #[must_use]
    pub fn resized(&self) -> &[String] {
        &self.resized
    }

    /// Writes the timeouts, limits and fixed identities of the programs.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be written.
    pub fn set_config(&self, config: &Config) -> std::result::Result<(), MapError> {
        self.config.insert(&0, config)
    }

    /// Returns the configuration of the programs, all zero before the first [`Self::set_config`].
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn config(&self) -> std::result::Result<Option<Config>, MapError> {
        self.config.get(&0)
    }

    /// Returns the file descriptor of a program by its name in [`palisade_abi::programs`], for BPF_PROG_TEST_RUN.
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
            proxy,
            proxy_filter,
            lookup,
        } = &self.programs;
        [
            xdp,
            tc_ingress,
            tc_egress,
            punt,
            reinject,
            punt_filter,
            pass,
            proxy,
            proxy_filter,
            lookup,
        ]
        .into_iter()
        .find(|p| p.name == name)
        .map(Program::fd)
    }

    /// Removes the pinned maps of other versions of `palisade_abi`. Call it only after this version has attached its
    /// programs to every interface: programs of other versions use those maps.
    ///
    /// # Errors
    /// [`OpenError::Io`] if a directory cannot be read or removed, [`OpenError::Map`] if the last flows of the old
    /// conntrack table cannot be copied.
    pub fn retire_other_versions(&self) -> Result<()> {
        self.commit()?;
        self.leave_old_conntrack()?;
        let own = version_dir(&self.pin_dir);
        for dir in version_dirs(&self.pin_dir)? {
            if dir != own {
                remove_dir_of_pins(&dir)?;
            }
        }
        self.forget_taken();
        Ok(())
    }
}

/// Raises RLIMIT_MEMLOCK: kernels before 5.11 charge the memory of maps to it, and its default is 64 kB. An error is
/// ignored: if the limit is too low, the creation of a map reports it.
fn lift_memlock() {
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` is valid for the call.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) };
}

/// Wanted type, sizes and flags of a map.
struct Wanted {
    name: String,
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// Origin of a map.
enum History {
    Made,
    Found,
    Resized(RawMap),
}

impl Wanted {
    fn new(name: &str, definition: &aya_obj::Map, limits: &Limits) -> Self {
        let map_type = definition.map_type();
        // A ring buffer has no keys or values: the kernel requires zero for both sizes, whatever sizes its definition
        // in the object has.
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
        // rename(2) replaces the pin atomically, so that another process finds the old map or the new one at the path.
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

    /// Copies the elements of a map to a map of another size, as far as they fit. Returns [`OpenError::TooSmall`] if a
    /// policy or address map would lose elements.
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
