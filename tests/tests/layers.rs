//! Crates below the policy compiler build without it: `cargo metadata` lists what each of them depends on.

use std::{
    collections::{BTreeSet, HashMap},
    process::Command,
};

use serde_json::Value;

/// Crates that use the types of `palisade-model`, but neither parse policies nor compile them.
const BELOW: [&str; 8] = [
    "palisade-model",
    "palisade-protocols",
    "palisade-fqdn",
    "palisade-inspect",
    "palisade-datapath",
    "palisade-discover",
    "palisade-worker",
    "palisade-flowlog",
];

/// Returns the packages that each package depends on, directly or not. Dev- and build-dependencies do not count.
fn dependencies() -> HashMap<String, BTreeSet<String>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        // Without the platform cargo needs the packages of all platforms, which may not be downloaded.
        .args([
            "--filter-platform",
            &format!("{}-unknown-linux-gnu", std::env::consts::ARCH),
        ])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let names: HashMap<String, String> = list(&metadata["packages"])
        .iter()
        .map(|package| (text(&package["id"]), text(&package["name"])))
        .collect();
    let direct: HashMap<String, Vec<String>> = list(&metadata["resolve"]["nodes"])
        .iter()
        .map(|node| {
            let normal = |dependency: &&Value| {
                list(&dependency["dep_kinds"])
                    .iter()
                    .any(|kind| kind["kind"].is_null())
            };
            let ids = list(&node["deps"])
                .iter()
                .filter(normal)
                .map(|dependency| text(&dependency["pkg"]))
                .collect();
            (text(&node["id"]), ids)
        })
        .collect();
    names
        .iter()
        .map(|(id, name)| {
            let mut seen = BTreeSet::new();
            let mut rest = vec![id];
            while let Some(id) = rest.pop() {
                rest.extend(direct[id].iter().filter(|&id| seen.insert(id.clone())));
            }
            (name.clone(), seen.iter().map(|id| names[id].clone()).collect())
        })
        .collect()
}

#[test]
fn crates_below_the_policy_compiler_do_not_depend_on_it() {
    let dependencies = dependencies();
    assert!(
        dependencies["palisade-policy"].contains("saphyr-parser"),
        "the graph is read"
    );
    for name in BELOW {
        for above in ["palisade-policy", "saphyr-parser"] {
            assert!(!dependencies[name].contains(above), "{name} depends on {above}");
        }
    }
    // The flow log writes JSON, and container engines answer in JSON; the crates that handle packets and maps do neither.
    let of_json = ["palisade-flowlog", "palisade-discover"];
    for name in BELOW.iter().filter(|name| !of_json.contains(name)) {
        assert!(
            !dependencies[*name].contains("serde_json"),
            "{name} depends on serde_json"
        );
    }
}
