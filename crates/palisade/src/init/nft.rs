//! Accept rules in the output of `nft list ruleset`, for the comments of the first policy. Pure.

/// Largest number of rules.
const MAX_RULES: usize = 100;

/// Returns the accept rules of the tables that have a chain at a filter hook, as `TABLE CHAIN: RULE`, without the table
/// that is named `own`.
pub(crate) fn accept_rules(ruleset: &str, own: &str) -> Vec<String> {
    let mut rules = Vec::new();
    let (mut table, mut chain) = (None, None);
    let (mut of_table, mut filters) = (Vec::new(), false);
    // Depth of braces within an object that is no chain, such as a set.
    let mut other = 0_usize;
    let mut pending = String::new();
    for line in ruleset.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if other > 0 {
            other = other.saturating_add(line.matches('{').count());
            other = other.saturating_sub(line.matches('}').count());
            continue;
        }
        match (table, chain) {
            (None, _) => {
                if let Some(name) = line
                    .strip_prefix("table ")
                    .and_then(|rest| rest.strip_suffix('{'))
                {
                    table = Some(name.trim());
                }
            }
            (Some(name), None) => {
                if line == "}" {
                    if filters && name.split_whitespace().last() != Some(own) {
                        rules.append(&mut of_table);
                    }
                    (table, filters) = (None, false);
                    of_table.clear();
                } else if let Some(name) = line
                    .strip_prefix("chain ")
                    .and_then(|rest| rest.strip_suffix('{'))
                {
                    chain = Some(name.trim());
                } else {
                    other = line
                        .matches('{')
                        .count()
                        .saturating_sub(line.matches('}').count());
                }
            }
            (Some(of), Some(name)) => {
                // nft breaks the lines of long sets behind a comma.
                pending.push_str(line);
                if line.ends_with(',') {
                    pending.push(' ');
                    continue;
                }
                let rule = std::mem::take(&mut pending);
                if rule == "}" {
                    chain = None;
                } else if rule.starts_with("type ") {
                    filters |= rule.starts_with("type filter ");
                } else if accepts(&rule) {
                    of_table.push(format!("{of} {name}: {rule}"));
                }
            }
        }
    }
    let more = rules.len().saturating_sub(MAX_RULES);
    if more > 0 {
        rules.truncate(MAX_RULES);
        rules.push(format!("and {more} more"));
    }
    rules
}

/// Returns whether a rule ends with the verdict accept. A comment can contain the word, too.
fn accepts(rule: &str) -> bool {
    let statement = rule.split(" comment \"").next().unwrap_or(rule);
    statement.split_whitespace().any(|word| word == "accept")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULESET: &str = "table inet filter {
\tset admins {
\t\ttype ipv4_addr
\t\telements = { 192.0.2.1,
\t\t\t     192.0.2.2 }
\t}

\tchain input {
\t\ttype filter hook input priority filter; policy drop;
\t\tct state established,related accept
\t\tip saddr { 192.0.2.1,
\t\t\t   192.0.2.2 } tcp dport 22 accept
\t\ttcp dport 23 drop comment \"never accept\"
\t\tjump web
\t}

\tchain web {
\t\ttcp dport { 80, 443 } accept comment \"the site\"
\t}
}
table ip nat {
\tchain postrouting {
\t\ttype nat hook postrouting priority srcnat; policy accept;
\t\tip saddr 10.0.0.0/8 accept
\t}
}
# Warning: table ip filter is managed by iptables-nft, do not touch!
table inet palisade {
\tchain input {
\t\ttype filter hook input priority filter; policy accept;
\t\ttcp dport 1 accept
\t}
}
";

    #[test]
    fn rules_that_accept_are_quoted_with_their_table_and_chain() {
        assert_eq!(
            accept_rules(RULESET, "palisade"),
            [
                "inet filter input: ct state established,related accept",
                "inet filter input: ip saddr { 192.0.2.1, 192.0.2.2 } tcp dport 22 accept",
                "inet filter web: tcp dport { 80, 443 } accept comment \"the site\"",
            ]
        );
        assert_eq!(accept_rules("garbage {\n}\n}", "palisade"), [""; 0]);
    }

    #[test]
    fn the_number_of_rules_is_limited() {
        let rules = "\t\taccept\n".repeat(MAX_RULES + 5);
        let ruleset =
            format!("table ip f {{\n\tchain c {{\n\t\ttype filter hook input priority 0;\n{rules}\t}}\n}}\n");
        let found = accept_rules(&ruleset, "palisade");
        assert_eq!(found.len(), MAX_RULES + 1);
        assert_eq!(found.last().map(String::as_str), Some("and 5 more"));
    }
}
