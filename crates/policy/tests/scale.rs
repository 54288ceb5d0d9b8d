//! Compile times of large inputs. Run with `cargo test --release -p palisade-policy --test scale -- --ignored
//! --nocapture`; the limits are for a release build.

use std::{
    collections::BTreeMap,
    sync::OnceLock,
    time::{Duration, Instant},
};

use palisade_model::{
    inventory::{Endpoint, Inventory, Options, Peer},
    labels::{Labels, parse_label},
    op::Op,
    snapshot::Snapshot,
};
use palisade_policy::{
    compile::{Changes, Compiler, CompilerState, FileContent},
    parse::parse,
    plan::plan,
};

fn labels(texts: &[String]) -> Labels {
    Labels::new(texts.iter().map(|text| parse_label(text)))
}

fn inventory(endpoints: u16, peers: u32) -> Inventory {
    let namespace = "k8s:io.kubernetes.pod.namespace=default".to_owned();
    Inventory {
        options: Options::default(),
        endpoints: (1..=endpoints)
            .map(|id| Endpoint {
                id,
                name: format!("e{id}"),
                namespace: "default".into(),
                labels: labels(&[format!("k8s:endpoint=e{id}"), namespace.clone()]),
                named_ports: BTreeMap::new(),
                addresses: vec![format!("10.0.{}.{}", id >> 8, id & 255).parse().unwrap()],
                audit: false,
            })
            .collect(),
        peers: (0..peers)
            .map(|n| Peer {
                name: format!("p{n}"),
                labels: labels(&[format!("k8s:app=a{n}"), namespace.clone()]),
                named_ports: BTreeMap::new(),
                prefixes: vec![
                    format!("10.{}.{}.{}/32", 64 + (n >> 16), (n >> 8) & 255, n & 255)
                        .parse()
                        .unwrap(),
                ],
            })
            .collect(),
    }
}

fn file(number: usize, endpoint: usize, port: usize) -> FileContent {
    let text = format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: p{number}}}\nspec:\n  \
         endpointSelector: {{matchLabels: {{endpoint: e{endpoint}}}}}\n  ingress:\n  - fromEndpoints: [{{matchLabels: \
         {{app: a{number}}}}}]\n    toPorts: [{{ports: [{{port: '{port}', protocol: TCP}}]}}]\n  - fromCIDR: \
         [172.{}.{}.0/24]\n",
        16 + (number >> 8) % 16,
        number & 255,
    );
    let parsed = parse(&format!("p{number}.yaml"), &text);
    assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
    FileContent {
        policies: parsed.policies,
        cidr_groups: Vec::new(),
    }
}

/// Returns the CPU time of the thread, so that the load of the machine does not count; the wall-clock time if the
/// kernel does not report it.
fn now() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    let on_cpu = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    on_cpu
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .map_or_else(|| START.get_or_init(Instant::now).elapsed(), Duration::from_nanos)
}

fn timed<T>(what: &str, action: impl FnOnce() -> T) -> (T, Duration) {
    let start = now();
    let result = action();
    let taken = now() - start;
    println!("{what}: {taken:?}");
    (result, taken)
}

fn measure(policies: usize, endpoints: u16, ports: usize) {
    println!("{policies} policies, {endpoints} endpoints, {ports} ports");
    let endpoint_of = |number: usize| number % usize::from(endpoints) + 1;
    let port_of = |number: usize| 1000 + number % ports;
    let (files, _) = timed("  parse", || {
        (0..policies)
            .map(|n| (format!("p{n}.yaml"), Some(file(n, endpoint_of(n), port_of(n)))))
            .collect()
    });
    let mut compiler = Compiler::new(&CompilerState::default());
    let (_, full) = timed("  full compile", || {
        compiler
            .update(Changes {
                inventory: Some(inventory(endpoints, policies as u32)),
                files,
            })
            .unwrap();
    });
    let (ops, _) = timed("  full plan", || plan(&Snapshot::default(), compiler.snapshot()));
    let entries: usize = compiler
        .snapshot()
        .tables
        .values()
        .map(|table| table.entries.len())
        .sum();
    println!("  {} steps, {entries} entries", ops.len());
    let mut worst = Duration::ZERO;
    for round in 0..20 {
        let number = round * 37 % policies;
        // Another port, or prefixes that no other policy names.
        let other = if round % 2 == 0 { number } else { policies + round };
        let change = Changes {
            inventory: None,
            files: BTreeMap::from([(
                format!("p{number}.yaml"),
                Some(file(other, endpoint_of(number), port_of(number + 1 + round))),
            )]),
        };
        let old = compiler.snapshot().clone();
        let start = now();
        compiler.update(change).unwrap();
        let compiled = now() - start;
        let ops = plan(&old, compiler.snapshot());
        let taken = now() - start;
        if taken > worst {
            worst = taken;
            let writes: usize = ops
                .iter()
                .map(|op| match op {
                    Op::PolicyPut(entries) => entries.len(),
                    Op::PolicyDelete(keys) => keys.len(),
                    Op::ClassPut(slots) => slots.len(),
                    _ => 1,
                })
                .sum();
            println!("  one rule changed: compile {compiled:?}, with plan {taken:?}, {writes} writes");
        }
    }
    if !cfg!(debug_assertions) {
        assert!(full < Duration::from_secs(2), "full compile took {full:?}");
        assert!(worst < Duration::from_millis(50), "a change took {worst:?}");
    }
}

#[test]
#[ignore = "a measurement"]
fn many_policies_of_many_endpoints() {
    measure(10_000, 100, 50);
}

#[test]
#[ignore = "a measurement"]
fn many_policies_of_one_endpoint() {
    measure(10_000, 1, 50);
}

#[test]
#[ignore = "a measurement"]
fn many_ports() {
    measure(10_000, 100, 5_000);
}
