//! `palisade policy apply`, `diff`, `rollback`: the policies are compiled and compared on the client's own thread, with
//! a copy of the compiler; the control thread only switches.

use std::{
    sync::{PoisonError, TryLockError},
    time::{Duration, SystemTime},
};

use palisade_advice::{
    record::Recorded,
    replay::{Candidate as ReplayCandidate, Replay},
};
use palisade_datapath::monotonic_coarse;
use palisade_flowlog::{Next, Timestamp};
use palisade_policy::compile::Compiler;

use super::{CHANGE_DEADLINE, Handlers, NO_ANSWER, explain::ONE_AT_A_TIME, map_error};
use crate::{
    control::api::{
        ApplyRequest, DeniedSession, FlowChange, PlanRequest, PolicyApplied, PolicyPlan, PolicySet, Session,
    },
    daemon::{
        changes::{self, Candidate, PolicyBase, Preparation, Switch},
        cuts,
        message::{ClientRequest, Message},
        trace,
    },
};

/// Age of the oldest recorded flow that a plan evaluates.
const FLOWS_AGE: Duration = Duration::from_secs(3_600);
/// Largest number of rows of a plan about connections and about flows.
const MAX_ROWS: usize = 200;
/// Longest and shortest time for a confirmation.
const CONFIRM_RANGE: std::ops::RangeInclusive<u64> = 1_000..=86_400_000;
/// Longest message of an author, bytes.
const MAX_MESSAGE: usize = 4_096;

impl Handlers {
    /// Returns what differs between two sets, and what the second one would do if it were applied.
    pub(super) fn plan_policies(&self, request: &PlanRequest) -> Result<PolicyPlan, String> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let base = self.base()?;
        let stored = |number| self.policy_store.texts(number);
        let number = self.policy_store.history().last().map_or(0, |last| last.number);
        let failed = |errors| PolicyPlan {
            number,
            errors,
            ..PolicyPlan::default()
        };
        let from = match changes::compile(&base, &request.from, &stored) {
            Ok(from) => from,
            Err(errors) => return Ok(failed(errors)),
        };
        let to = match changes::compile(&base, &request.to, &stored) {
            Ok(to) => to,
            Err(errors) => return Ok(failed(errors)),
        };
        let mut plan = changes::differences(&from, &to);
        plan.number = number;
        let entry = |set: &PolicySet| match set {
            PolicySet::Number(number) => {
                let rows = changes::rows(&self.policy_store.history());
                rows.into_iter().find(|row| row.number == *number)
            }
            _ => None,
        };
        (plan.from, plan.to) = (entry(&request.from), entry(&request.to));
        if request.dry_run {
            plan.refused = self.refusal(&base, &request.to, &to);
            plan.denied_sessions = self.denied_sessions(&to.compiler, &request.sessions);
            self.add_cuts(&mut plan, &from, &to)?;
            self.add_flows(&mut plan, &base, &to)?;
        }
        Ok(plan)
    }

    fn denied_sessions(&self, compiler: &Compiler, sessions: &[Session]) -> Vec<DeniedSession> {
        let now = monotonic_coarse();
        changes::denied_sessions(compiler, sessions, |endpoint, session| {
            cuts::of_session(&self.datapath, &self.names, endpoint, session, now)
        })
    }

    /// Adds the live connections that a set would cut and the other one does not.
    fn add_cuts(&self, plan: &mut PolicyPlan, from: &Candidate, to: &Candidate) -> Result<(), String> {
        let found = cuts::would_cut(
            &self.datapath,
            &self.names,
            &self.shared.get(),
            [&from.compiler, &to.compiler],
            monotonic_coarse(),
        )
        .map_err(map_error)?;
        plan.cut = found.total;
        plan.cuts = found.connections;
        plan.cuts.truncate(MAX_ROWS);
        Ok(())
    }

    /// Adds the recorded flows of the last hour to which a set would give another verdict.
    fn add_flows(&self, plan: &mut PolicyPlan, base: &PolicyBase, to: &Candidate) -> Result<(), String> {
        let problems = |problems: Vec<palisade_model::diagnostic::Diagnostic>| {
            let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
            lines.join("\n")
        };
        let files = to.compiler.files();
        let candidate = ReplayCandidate {
            files: files
                .map(|(name, content)| {
                    (
                        name.to_owned(),
                        Some(palisade_policy::compile::FileContent::clone(content)),
                    )
                })
                .collect(),
            inventory: to.compiler.inventory().clone(),
            http: trace::http_options(&base.http),
        };
        let inspectors = trace::inspectors(&base.http);
        let mut replay = Replay::new(candidate, &inspectors);
        let an_hour_ago = Timestamp::from_system_time(SystemTime::now()).before(FLOWS_AGE);
        let mut cursor = self.ring.since(an_hour_ago);
        let mut oldest: Option<Timestamp> = None;
        // Flows that arrive meanwhile are left out.
        for _ in 0..=cursor.behind() {
            match cursor.read() {
                Some(Next::Flow(flow)) => {
                    oldest = Some(oldest.map_or(flow.time, |oldest| oldest.min(flow.time)));
                    if let Ok(recorded) = Recorded::of_flow(&flow) {
                        replay.push(&recorded).map_err(problems)?;
                    }
                }
                Some(Next::Lost(lost)) => plan.flows_lost += lost.count,
                None => break,
            }
        }
        let report = replay.finish().map_err(problems)?;
        plan.flows_evaluated = report.evaluated;
        plan.flows_since = Some(oldest.unwrap_or(an_hour_ago).to_string());
        let changes = report.changes.into_iter();
        plan.flows = changes
            .take(MAX_ROWS)
            .map(|change| FlowChange {
                direction: change.direction.to_owned(),
                endpoint: change.endpoint,
                peer: change.peer,
                port: change.port,
                now: change.now.text().to_owned(),
                then: change.then.text().to_owned(),
                then_by: change.then_by,
                flows: change.flows,
            })
            .collect();
        Ok(())
    }

    /// Puts a set in force.
    pub(super) fn apply_policies(&self, request: ApplyRequest) -> Result<PolicyApplied, String> {
        if let Some(wait) = request.confirm_ms.filter(|wait| !CONFIRM_RANGE.contains(wait)) {
            return Err(format!("--confirm {wait} ms: use 1s to 24h"));
        }
        if request.message.len() > MAX_MESSAGE {
            return Err(format!("the message is longer than {MAX_MESSAGE} bytes"));
        }
        let _turn = match ONE_AT_A_TIME.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err("another command compares or changes the policies: try again".to_owned());
            }
        };
        let base = self.base()?;
        let stored = |number| self.policy_store.texts(number);
        let to = changes::compile(&base, &request.set, &stored).map_err(|errors| errors.join("\n"))?;
        if let Some(refusal) = self.refusal(&base, &request.set, &to) {
            return Err(refusal);
        }
        if request.confirm_ms.is_some()
            && let Some(refusal) = changes::blank_before(&base.texts, &to.texts)
        {
            return Err(refusal);
        }
        let number = self.policy_store.history().last().map_or(0, |last| last.number);
        if request.base.is_some_and(|base| base != number) {
            return Err(
                "the policies have changed meanwhile; nothing was applied: run the command again".to_owned(),
            );
        }
        if !request.force
            && let Some(denied) = self.denied_sessions(&to.compiler, &request.sessions).first()
        {
            return Err(format!(
                "this set denies your own session {} ({}); nothing was applied. Allow it, or use --force",
                denied.session, denied.decided_by
            ));
        }
        let of = match request.set {
            PolicySet::Number(number) => Some(number),
            _ => None,
        };
        let change = self.policy_store.prepare(Preparation {
            from: base.texts.clone(),
            to: to.texts.clone(),
            modes: to.modes,
            confirm: request.confirm_ms.map(Duration::from_millis),
            author: request.author,
            message: request.message,
        })?;
        let number = change.number;
        let switch = Switch {
            change,
            from: base.texts,
            to: to.texts,
            of,
        };
        self.send(CHANGE_DEADLINE, |reply| {
            Message::Client(ClientRequest::PolicySwitch(Box::new(switch), reply))
        })
        .map_err(|problem| {
            if problem.ends_with(NO_ANSWER) {
                format!("{problem}; `palisade status` shows whether change {number} is in force")
            } else {
                problem
            }
        })
    }

    fn base(&self) -> Result<PolicyBase, String> {
        Ok(*self.look_up(ClientRequest::PolicyBase)?)
    }

    /// Returns why a set cannot be applied; `None` if it can.
    fn refusal(&self, base: &PolicyBase, set: &PolicySet, to: &Candidate) -> Option<String> {
        let files = changes::changed_files(&base.texts, &to.texts);
        let touched = || files.added.iter().chain(&files.changed).chain(&files.removed);
        // A set of the whole folder replaces broken files too.
        let replaces = |name: &String| match set {
            PolicySet::Current => false,
            PolicySet::With(files) => files.contains_key(name),
            PolicySet::Only(_) | PolicySet::Number(_) => true,
        };
        let broken = base.broken.iter().find(|name| !replaces(name)).map(|name| {
            format!(
                "{name}: its present content is not in force, see `palisade status`: repair or remove the file first, because \
                 a change could not be rolled back to it"
            )
        });
        base.refusal
            .clone()
            .or_else(|| self.policy_store.refusal(touched()))
            .or(broken)
    }
}
