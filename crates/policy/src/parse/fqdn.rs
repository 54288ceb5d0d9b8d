//! `matchName` and `matchPattern`.

use palisade_model::rule::FqdnPattern;
use palisade_yaml::quoted;

use super::{
    name_syntax::{host_name, names_no_host},
    reader::At,
};

/// Parses an element of `toFQDNs` or of dns rules. `both`: whether `matchName` and `matchPattern` can be given together
/// (dns rules).
pub(super) fn fqdn_selector(at: At<'_>, both: bool) -> Option<Vec<FqdnPattern>> {
    let object = at.object()?;
    let read = |name, wildcards| {
        let text = object.text(name)?;
        match host_name(text, wildcards) {
            Ok(host) => {
                if let (Some(why), Some(at)) = (names_no_host(text), object.field(name)) {
                    at.unfit(format!("{} cannot be a {name}: {why}", quoted(text)));
                }
                Some(host)
            }
            Err(why) => {
                if let Some(at) = object.field(name) {
                    at.error(format!("{} cannot be a {name}: {why}", quoted(text)));
                }
                None
            }
        }
    };
    let name = read("matchName", false).map(FqdnPattern::Name);
    let pattern = read("matchPattern", true).map(FqdnPattern::Pattern);
    let all_known = object.finish();
    let given = [object.text("matchName"), object.text("matchPattern")]
        .iter()
        .flatten()
        .count();
    if given == 0 && all_known {
        at.unfit("one of matchName and matchPattern is needed");
    } else if given == 2 && !both {
        at.error("only one of matchName and matchPattern can be given; write an element for each");
    }
    Some([name, pattern].into_iter().flatten().collect())
}
