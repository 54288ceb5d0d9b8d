//! Loading of the programs of the BPF object.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, SkLookup, Xdp},
};
use palisade_abi::programs;

use crate::{OpenError, maps::RawMap, object::OBJECT, sys::bpf};

type Result<T> = std::result::Result<T, OpenError>;

/// Loaded program.
#[derive(Debug)]
pub(crate) struct Program {
    pub name: &'static str,
    pub fd: OwnedFd,
}

impl Program {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The programs that give verdicts.
#[derive(Debug)]
pub(crate) struct VerdictPrograms {
    pub xdp: Program,
    pub tc_ingress: Program,
    pub tc_egress: Program,
}

/// All loaded programs.
#[derive(Debug)]
pub(crate) struct Programs {
    pub xdp: Program,
    pub tc_ingress: Program,
    pub tc_egress: Program,
    pub punt: Program,
    pub reinject: Program,
    pub punt_filter: Program,
    pub pass: Program,
    pub proxy: Program,
    pub proxy_filter: Program,
    pub lookup: Program,
}

pub(crate) fn load_programs(map_dir: &Path, maps: &BTreeMap<String, RawMap>) -> Result<Programs> {
    let mut loader = EbpfLoader::new();
    for (name, map) in maps {
        loader
            .map_pin_path(name, map_dir.join(name))
            .map_max_entries(name, map.info.max_entries);
    }
    let mut ebpf = loader.load(OBJECT)?;
    let mut loaded = load_named(&mut ebpf, &programs::ALL)?;
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
        proxy: take(programs::PROXY)?,
        proxy_filter: take(programs::PROXY_FILTER)?,
        lookup: take(programs::LOOKUP)?,
    })
}

/// Loads programs of an object by their names.
pub(crate) fn load_named(ebpf: &mut Ebpf, names: &[&'static str]) -> Result<BTreeMap<&'static str, Program>> {
    // One thread for each program: most of the time is spent in the verifier, which is single-threaded per program.
    let mut loaded = BTreeMap::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> = ebpf
            .programs_mut()
            .filter_map(|(name, program)| {
                let name = names.iter().copied().find(|known| *known == name)?;
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
    Ok(loaded)
}

fn load_program(name: &'static str, program: &mut aya::programs::Program) -> Result<Program> {
    let refused = |error| OpenError::Program {
        program: name,
        error: Box::new(error),
    };
    if matches!(name, programs::XDP_INGRESS | programs::PUNT | programs::PASS) {
        let xdp: &mut Xdp = program.try_into().map_err(refused)?;
        xdp.load().map_err(refused)?;
    } else if name == programs::LOOKUP {
        let lookup: &mut SkLookup = program.try_into().map_err(refused)?;
        lookup.load().map_err(refused)?;
    } else {
        let classifier: &mut SchedClassifier = program.try_into().map_err(refused)?;
        classifier.load().map_err(refused)?;
    }
    let fd = bpf::duplicate(program.fd().map_err(refused)?)?;
    Ok(Program { name, fd })
}
