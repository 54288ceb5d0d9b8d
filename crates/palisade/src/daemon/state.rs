//! The state file: numbers that must not change over a restart, and settings made at run time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use palisade_discover::{Found, Labelled};
use serde::{Deserialize, Serialize};
use tracing::{error, warn};

use super::{
    checked_file,
    keeper::{Keeper, STATE},
};

/// Endpoint number of the node.
pub(super) const NODE: u16 = 1;
/// First endpoint number of a workload.
const FIRST_WORKLOAD: u16 = 2;
/// Version of the file's layout.
const VERSION: u32 = 1;

/// Content of the state file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct State<C> {
    version: u32,
    /// Endpoint numbers by `namespace/name`. A removed endpoint keeps its number until all numbers are used.
    pub endpoints: BTreeMap<String, u16>,
    /// Endpoints that `palisade endpoint config` has set to audit mode.
    pub audit: BTreeSet<String>,
    /// Endpoints that were found, by `namespace/name`.
    #[serde(default)]
    pub discovered: BTreeMap<String, Found>,
    /// Interfaces that lead, or have led, to a workload whose labels are known.
    #[serde(default)]
    pub labelled: Labelled,
    /// State of the policy compiler: identities, rule numbers.
    pub compiler: C,
}

/// The state and its file.
#[derive(Debug)]
pub(super) struct StateFile<C> {
    /// Writes the state directory.
    pub keeper: Keeper,
    /// State that was last given to `keeper`.
    given: Option<State<C>>,
    /// Current state.
    pub state: State<C>,
    /// Why the file could not be used at the start, and the consequence.
    pub problem: Option<String>,
}

impl<C> StateFile<C>
where
    C: Clone + Default + PartialEq + Serialize + for<'de> Deserialize<'de>,
{
    /// Reads the file. A file that cannot be read or parsed is renamed. Identities and endpoints then get new numbers,
    /// and the audit mode that was set for single endpoints is lost.
    ///
    /// # Errors
    /// The thread that writes the directory cannot be started.
    pub(super) fn load(dir: &Path) -> io::Result<Self> {
        let path = dir.join(STATE);
        let read = match fs::read(&path) {
            Ok(bytes) => understand(&bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(State::default()),
            Err(error) => Err(error.to_string()),
        };
        let mut problem = None;
        let mut state = match read {
            Ok(state) => state,
            Err(why) => {
                let aside = path.with_extension("json.broken");
                let put = match fs::rename(&path, &aside) {
                    Ok(()) => format!("renamed to {}", aside.display()),
                    Err(error) => format!("it cannot be renamed either ({error})"),
                };
                let text = format!(
                    "{}: {why}; {put}: identities and endpoints get new numbers, and endpoints in audit mode are enforced",
                    path.display(),
                );
                error!(file = %path.display(), error = why, "the state file cannot be used");
                problem = Some(text);
                State::default()
            }
        };
        state.version = VERSION;
        Ok(Self {
            keeper: Keeper::start(dir)?,
            given: None,
            state,
            problem,
        })
    }

    /// If the state has changed since the last call, passes it to `keeper`, which writes the file.
    pub(super) fn save(&mut self) {
        if self.given.as_ref() == Some(&self.state) {
            return;
        }
        match serde_json::to_string(&self.state) {
            Ok(content) => {
                self.keeper.state(content);
                self.given = Some(self.state.clone());
            }
            Err(error) => error!(file = STATE, %error, "the state cannot be serialised"),
        }
    }
}

/// Returns the state in a state directory, which stays as it is.
///
/// # Errors
/// The file cannot be read or parsed.
pub(super) fn read<C: for<'de> Deserialize<'de>>(dir: &Path) -> Result<State<C>, String> {
    let path = dir.join(STATE);
    fs::read(&path)
        .map_err(|error| error.to_string())
        .and_then(|bytes| understand(&bytes))
        .map_err(|problem| format!("{}: {problem}", path.display()))
}

fn understand<C: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<State<C>, String> {
    // Older versions wrote the JSON without the first line.
    let text = if checked_file::is_sealed(bytes) {
        checked_file::unseal(bytes)
            .map_err(|damaged| damaged.to_string())?
            .as_bytes()
    } else {
        bytes
    };
    let state: State<C> = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    match state.version {
        0 | VERSION => Ok(state),
        other => Err(format!("version {other}, this is version {VERSION}")),
    }
}

impl<C> State<C> {
    /// Returns a copy without the state of the compiler, in which an inventory can be tried.
    pub(super) fn without_compiler(&self) -> State<()> {
        State {
            version: self.version,
            endpoints: self.endpoints.clone(),
            audit: self.audit.clone(),
            discovered: self.discovered.clone(),
            labelled: self.labelled.clone(),
            compiler: (),
        }
    }

    /// Returns the number of an endpoint, and assigns one to a new endpoint; `None` if no number is free. Once all
    /// numbers are used, only endpoints for which `configured` returns true keep their numbers.
    pub(super) fn endpoint(&mut self, name: &str, configured: impl Fn(&str) -> bool) -> Option<u16> {
        if let Some(id) = self.endpoints.get(name) {
            return Some(*id);
        }
        let free = |taken: &BTreeMap<String, u16>| {
            // Numbers are assigned in ascending order, so that a number is used again as late as possible.
            let taken: BTreeSet<u16> = taken.values().copied().collect();
            let after = taken.last().copied().unwrap_or(0).max(FIRST_WORKLOAD - 1);
            (after..u16::MAX)
                .map(|n| n + 1)
                .chain(FIRST_WORKLOAD..=u16::MAX)
                .find(|id| !taken.contains(id))
        };
        let id = free(&self.endpoints).or_else(|| {
            warn!("all endpoint numbers were used once; numbers of removed endpoints are used again");
            self.endpoints.retain(|name, _| configured(name));
            free(&self.endpoints)
        })?;
        self.endpoints.insert(name.to_owned(), id);
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Numbers = BTreeMap<String, u32>;

    #[test]
    fn the_state_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = StateFile::<Numbers>::load(dir.path()).unwrap();
        assert_eq!(file.state.endpoint("default/a", |_| true), Some(2));
        assert_eq!(file.state.endpoint("default/b", |_| true), Some(3));
        file.state.audit.insert("default/a".into());
        file.state.compiler.insert("app=a".into(), 256);
        file.save();
        file.keeper.flush().unwrap();
        let mut again = StateFile::<Numbers>::load(dir.path()).unwrap();
        assert_eq!(again.state, file.state);
        assert_eq!(again.state.endpoint("default/b", |_| true), Some(3));
        assert_eq!(again.state.endpoint("default/c", |_| true), Some(4));
    }

    #[test]
    fn an_unchanged_state_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = StateFile::<Numbers>::load(dir.path()).unwrap();
        file.save();
        file.keeper.flush().unwrap();
        fs::remove_file(dir.path().join("state.json")).unwrap();
        file.save();
        file.keeper.flush().unwrap();
        assert!(!dir.path().join("state.json").exists());
    }

    #[test]
    fn an_unreadable_state_file_is_renamed() {
        let dir = tempfile::tempdir().unwrap();
        for text in [
            "{\"version\":1,\"endp",
            "# kept by palisade 3 00000000\n{}\n",
            "{\"version\":9,\"endpoints\":{},\"audit\":[],\"compiler\":{}}",
            "",
        ] {
            fs::write(dir.path().join("state.json"), text).unwrap();
            let file = StateFile::<Numbers>::load(dir.path()).unwrap();
            assert!(file.state.endpoints.is_empty());
            assert_eq!(
                fs::read_to_string(dir.path().join("state.json.broken")).unwrap(),
                text
            );
        }
    }

    #[test]
    fn endpoint_numbers_are_reused_only_when_all_are_used() {
        let mut state = State::<Numbers>::default();
        let all = FIRST_WORKLOAD..=u16::MAX;
        state.endpoints = all.map(|n| (format!("x/{n}"), n)).collect();
        assert_eq!(state.endpoint("x/new", |_| true), None);
        assert_eq!(state.endpoint("x/new", |name| name != "x/700"), Some(700));
    }
}
