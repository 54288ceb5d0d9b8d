//! Results that CNI runtimes keep: one JSON file for each attachment of a container to a network, in
//! `/var/lib/cni/results` or, with the runtime's own data around the result, `/var/lib/cni/cache/results`.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use serde::Deserialize;

/// A kept result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// Id of the container.
    pub container: String,
    /// Name of the interface inside.
    pub interface: String,
    /// File of the network namespace.
    pub netns: PathBuf,
    /// Addresses of the container.
    pub addresses: Vec<IpAddr>,
    /// Arguments of the runtime (`K8S_POD_NAME`), which serve as labels of the container.
    pub arguments: BTreeMap<String, String>,
}

/// Parses a file.
///
/// # Errors
/// The file is neither of both forms, or does not name the container and its network namespace.
pub fn parse(text: &[u8]) -> Result<Attached, String> {
    #[derive(Deserialize)]
    struct Cached {
        kind: Option<String>,
        #[serde(rename = "containerId")]
        container: Option<String>,
        #[serde(rename = "ifName")]
        interface: Option<String>,
        netns: Option<String>,
        #[serde(rename = "cniArgs")]
        arguments: Option<Vec<(String, String)>>,
        result: Option<Answer>,
    }
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        interfaces: Vec<Interface>,
        #[serde(default)]
        ips: Vec<Ip>,
    }
    #[derive(Deserialize)]
    struct Interface {
        name: String,
        sandbox: Option<String>,
    }
    #[derive(Deserialize)]
    struct Ip {
        address: IpNet,
    }
    let failed = |error: serde_json::Error| format!("cannot be parsed: {error}");
    let cached: Cached = serde_json::from_slice(text).map_err(failed)?;
    if cached.kind.as_deref().is_some_and(|kind| kind != "cniCacheV1") {
        return Err("is a cache of another version than cniCacheV1".to_owned());
    }
    let answer = match cached.result {
        Some(answer) => answer,
        None => serde_json::from_slice(text).map_err(failed)?,
    };
    let inside = answer.interfaces.iter().find(|interface| {
        interface
            .sandbox
            .as_deref()
            .is_some_and(|sandbox| !sandbox.is_empty())
    });
    let netns = cached
        .netns
        .or_else(|| inside.and_then(|interface| interface.sandbox.clone()))
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .ok_or("names no network namespace")?;
    let interface = cached
        .interface
        .or_else(|| inside.map(|interface| interface.name.clone()))
        .unwrap_or_default();
    let container = cached
        .container
        .filter(|id| is_id(id))
        .ok_or("names no container")?;
    Ok(Attached {
        container,
        interface,
        netns,
        addresses: answer.ips.iter().map(|ip| ip.address.addr()).collect(),
        arguments: cached.arguments.into_iter().flatten().collect(),
    })
}

/// Returns whether a text can be the id of a container (CNI specification: letters, digits, `_`, `.` and `-`).
fn is_id(id: &str) -> bool {
    (1..=253).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CACHED: &str = r#"{"kind":"cniCacheV1","containerId":"0123abcd","config":"e30=","ifName":"eth0","networkName":"net",
        "netns":"/var/run/netns/cni-1","cniArgs":[["IgnoreUnknown","1"],["K8S_POD_NAME","web"]],"result":{"cniVersion":"1.0.0",
        "interfaces":[{"name":"veth1","mac":"aa:bb:cc:dd:ee:ff"},{"name":"eth0","mac":"aa:bb:cc:dd:ee:00","sandbox":
        "/var/run/netns/cni-1"}],"ips":[{"interface":1,"address":"10.88.0.2/16","gateway":"10.88.0.1"},
        {"interface":1,"address":"fd00:88::2/64"}],"routes":[]}}"#;

    #[test]
    fn a_cached_result_is_read() {
        let attached = parse(CACHED.as_bytes()).unwrap();
        assert_eq!(attached.container, "0123abcd");
        assert_eq!(attached.netns, PathBuf::from("/var/run/netns/cni-1"));
        let addresses: Vec<String> = attached.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.88.0.2", "fd00:88::2"]);
        assert_eq!(attached.arguments["K8S_POD_NAME"], "web");
    }

    #[test]
    fn a_result_without_container_or_namespace_is_refused() {
        for (from, to, message) in [
            ("0123abcd", "../x", "names no container"),
            ("/var/run/netns/cni-1", "x", "names no network namespace"),
            ("cniCacheV1", "cniCacheV9", "another version"),
            ("10.88.0.2/16", "10.88.0.2", "cannot be parsed"),
        ] {
            let error = parse(CACHED.replace(from, to).as_bytes()).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0..700_usize) {
            let _ = (parse(&bytes), parse(CACHED.as_bytes().get(..cut).unwrap_or_default()));
        }
    }
}
