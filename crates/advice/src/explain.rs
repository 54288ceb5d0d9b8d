//! Explanation of one packet: the trace, the rules that nearly match, and the smallest addition that would allow it.

use std::fmt;

use palisade_abi::Direction;
use palisade_model::request::RequestEvaluator;
use palisade_policy::{
    compile::Compiler,
    trace::{self, Outcome, Question, Trace},
};
use serde::Serialize;

use crate::{
    addition::addition,
    near::{SideOf, near_misses},
};
pub use crate::{
    addition::{Addition, InPolicy},
    near::{Failed, NearMiss},
};

/// The explanation of a packet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// The recorded flow that the packet is taken from, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recorded: Option<String>,
    /// The verdict of the policies in force, as `policy trace` explains it.
    #[serde(flatten)]
    pub trace: Trace,
    /// More about each of [`Trace::sides`].
    pub details: Vec<Detail>,
    /// An addition that would allow the packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addition: Option<Addition>,
    /// Why no addition allows the packet.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub obstacles: Vec<String>,
}

/// More about the verdict of one endpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Detail {
    /// `ingress` or `egress`.
    pub direction: &'static str,
    /// Revision of the endpoint's policy.
    pub revision: u32,
    /// For a denied packet, the rules that nearly match, the closest first.
    pub nearly: Vec<NearMiss>,
}

/// Returns the explanation of the verdict on the packet that `question` describes. If the traffic is inspected,
/// `evaluator` decides about the request of the question.
///
/// # Errors
/// A message if there can be no verdict, for example because the source or the destination is unknown.
pub fn explain(
    compiler: &Compiler,
    question: &Question,
    evaluator: &dyn RequestEvaluator,
) -> Result<Explanation, String> {
    let ends = trace::ends(compiler, question)?;
    let trace = trace::trace_between(&ends, question, evaluator)?;
    let snapshot = ends.compiler.snapshot();
    let mut details = Vec::new();
    for side in &trace.sides {
        let (direction, other) = if side.direction == "egress" {
            (Direction::Egress, &ends.destination)
        } else {
            (Direction::Ingress, &ends.source)
        };
        let endpoints = &ends.compiler.inventory().endpoints;
        let endpoint = endpoints.iter().find(|known| known.id == side.endpoint);
        let denied = matches!(side.verdict, Outcome::Denied | Outcome::Audited);
        let nearly = endpoint.filter(|_| denied).map(|endpoint| {
            near_misses(SideOf {
                compiler: &ends.compiler,
                endpoint,
                direction,
                other,
                question,
            })
        });
        details.push(Detail {
            direction: side.direction,
            revision: snapshot
                .endpoints
                .get(&side.endpoint)
                .map_or(0, |state| state.revision),
            nearly: nearly.unwrap_or_default(),
        });
    }
    let (addition, obstacles) = match addition(compiler, &ends, question, evaluator) {
        Ok(addition) => (addition, Vec::new()),
        Err(obstacles) => (None, obstacles),
    };
    Ok(Explanation {
        recorded: None,
        trace,
        details,
        addition,
        obstacles,
    })
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(recorded) = &self.recorded {
            writeln!(f, "{recorded}")?;
        }
        // The lines of the trace, each side followed by what nearly matches.
        let text = self.trace.to_string();
        let mut sides = self.details.iter();
        let mut pending: Option<&Detail> = None;
        for line in text.lines() {
            if !line.starts_with(' ')
                && let Some(detail) = pending.take()
            {
                write_detail(f, detail)?;
            }
            let begins_side = ["egress of ", "ingress of "]
                .iter()
                .any(|begin| line.starts_with(begin));
            if begins_side {
                pending = sides.next();
            }
            writeln!(f, "{line}")?;
        }
        for obstacle in &self.obstacles {
            writeln!(f, "{obstacle}")?;
        }
        if let Some(addition) = &self.addition {
            writeln!(
                f,
                "\nwith this addition it is {} (compiled with the policies in force, and evaluated):\n",
                addition.verdict
            )?;
            f.write_str(&addition.yaml)?;
            for part in &addition.in_policies {
                writeln!(
                    f,
                    "\nor with this element of {} in policy {} ({}):\n",
                    part.section, part.policy, part.location
                )?;
                f.write_str(&part.yaml)?;
            }
            for note in &addition.notes {
                writeln!(f, "note: {note}")?;
            }
        }
        Ok(())
    }
}

fn write_detail(f: &mut fmt::Formatter<'_>, detail: &Detail) -> fmt::Result {
    writeln!(f, "  policy revision {}", detail.revision)?;
    for near in &detail.nearly {
        writeln!(f, "  nearly: {}", near.rule)?;
        for failed in &near.failed {
            writeln!(f, "    {}: {}", failed.requirement, failed.text)?;
        }
    }
    Ok(())
}
