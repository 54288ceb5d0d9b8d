//! Prefixes of addresses.

use std::net::IpAddr;

use ipnet::IpNet;
use palisade_model::rule::{CidrRule, Peer};
use palisade_yaml::quoted;

use super::{
    name_syntax::is_dns_subdomain,
    reader::{At, Object},
    selector::{self, Keys},
};

/// `ADDRESS/LENGTH` as written. The address can have host bits set.
#[derive(Clone, Copy)]
struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    fn contains(&self, address: IpAddr) -> bool {
        self.net().is_some_and(|net| net.contains(&address))
    }

    fn net(&self) -> Option<IpNet> {
        IpNet::new(self.address, self.length).ok().map(|net| net.trunc())
    }
}

fn prefix(text: &str) -> Result<Prefix, String> {
    let Some((address, length)) = text.split_once('/') else {
        return Err(format!("{} is not a prefix; write ADDRESS/LENGTH", quoted(text)));
    };
    let address = parse_address(address).ok_or_else(|| format!("{} has no valid address", quoted(text)))?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let digits = !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit());
    match length.parse::<u8>() {
        Ok(length) if digits && length <= longest && text.ends_with(&format!("/{length}")) => {
            Ok(Prefix { address, length })
        }
        _ => Err(format!(
            "{} has no valid length; it must be a number from 0 to {longest}",
            quoted(text)
        )),
    }
}

fn parse_address(text: &str) -> Option<IpAddr> {
    text.parse().ok()
}

/// Parses `ADDRESS/LENGTH` and masks the host bits.
pub(super) fn net(at: At<'_>) -> Option<IpNet> {
    let text = at.string()?;
    match prefix(text) {
        Ok(prefix) => prefix.net(),
        Err(message) => {
            at.error(message);
            None
        }
    }
}

/// Parses `ADDRESS/LENGTH` or `ADDRESS`, as in `fromCIDR` and `toCIDR`.
pub(super) fn net_or_address(at: At<'_>) -> Option<IpNet> {
    let text = at.string()?;
    if text.contains('/') {
        return net(at);
    }
    let address = match text.split_once('%') {
        Some((address, zone)) if at.is_bare() && address.contains(':') && !zone.is_empty() => {
            at.warning("the zone of the address is ignored");
            address
        }
        _ => text,
    };
    match parse_address(address) {
        Some(address) => Some(IpNet::from(address)),
        None => {
            at.error(format!("{} is neither an address nor a prefix", quoted(text)));
            None
        }
    }
}

/// Parses an element of `fromCIDRSet` or `toCIDRSet`.
pub(super) fn cidr_set_entry(at: At<'_>) -> Option<Peer> {
    let object = at.object()?;
    let cidr = object.field("cidr").filter(|at| at.node.as_str() != Some(""));
    let group = object
        .field("cidrGroupRef")
        .filter(|at| at.node.as_str() != Some(""));
    let groups = object.field("cidrGroupSelector");
    let given = [cidr.is_some(), group.is_some(), groups.is_some()]
        .iter()
        .filter(|given| **given)
        .count();
    let except = |within| excepts(&object, within);
    let peer = if given == 0 {
        None
    } else if given > 1 {
        at.error("only one of cidr, cidrGroupRef and cidrGroupSelector can be given");
        None
    } else if let Some(cidr) = cidr {
        cidr_rule(&object, cidr, false).map(Peer::Cidr)
    } else if let Some(group) = group {
        group_name(group).map(|name| Peer::CidrGroup {
            name,
            except: except(None),
        })
    } else {
        groups
            .and_then(|groups| selector::read(groups, Keys::Of("cidrgroup")))
            .map(|selector| Peer::CidrGroupSelector {
                selector,
                except: except(None),
            })
    };
    if peer.is_none() {
        object.ignore(&["except"]);
    }
    if object.finish() && given == 0 {
        at.error("one of cidr, cidrGroupRef and cidrGroupSelector is needed");
    }
    peer
}

fn group_name(at: At<'_>) -> Option<String> {
    let name = at.string()?;
    if is_dns_subdomain(name) {
        return Some(name.to_owned());
    }
    at.error(format!(
        "{} cannot be the name of a CiliumCIDRGroup",
        quoted(name)
    ));
    None
}

/// Parses `ipBlock` of a NetworkPolicy. The exceptions (`except`) must be within the block and smaller than the block.
pub(super) fn ip_block(at: At<'_>) -> Option<Peer> {
    let object = at.object()?;
    let rule = object
        .required("cidr")
        .and_then(|cidr| cidr_rule(&object, cidr, true));
    if rule.is_none() {
        object.ignore(&["except"]);
    }
    object.finish();
    rule.map(Peer::Cidr)
}

fn cidr_rule<'a>(object: &'a Object<'a>, cidr: At<'a>, strictly: bool) -> Option<CidrRule> {
    let text = cidr.string()?;
    match prefix(text) {
        Ok(prefix) => {
            let except = excepts(object, Some((prefix, strictly)));
            Some(CidrRule {
                cidr: prefix.net()?,
                except,
            })
        }
        Err(message) => {
            cidr.error(message);
            None
        }
    }
}

fn excepts<'a>(object: &'a Object<'a>, within: Option<(Prefix, bool)>) -> Vec<IpNet> {
    let Some(list) = object.field("except").and_then(|at| at.list()) else {
        return Vec::new();
    };
    list.read(|at| {
        let text = at.string()?;
        let except = match prefix(text) {
            Ok(except) => except,
            Err(message) => {
                at.error(message);
                return None;
            }
        };
        if let Some((outer, strictly)) = within
            && (!outer.contains(except.address) || strictly && except.length <= outer.length)
        {
            at.error(format!(
                "{} is not inside of {}/{}",
                quoted(text),
                outer.address,
                outer.length
            ));
            return None;
        }
        except.net()
    })
}
