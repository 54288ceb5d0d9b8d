//! Answers of container engines and results of CNI. The first byte chooses the parser. No input
//! makes a parser panic, and labels and lists that are read keep their limits.

use palisade_discover::{cni, containerd, docker};

/// Parses one answer.
pub fn run(input: &[u8]) {
    let Some((which, answer)) = input.split_first() else {
        return;
    };
    let short = |labels: usize| assert!(labels <= docker::MAX_LABEL_BYTES);
    match which % 8 {
        0 => drop(docker::list(answer)),
        1 => {
            let id = "0123456789abcdef".repeat(4);
            if let Ok(container) = docker::inspect(&id, answer) {
                assert_eq!(container.id, id);
                short(bytes(container.labels.iter()));
            }
        }
        2 => {
            if let Ok(labels) = docker::image_labels(answer) {
                short(bytes(labels.iter()));
                assert!(docker::own_labels(&labels, &labels).is_empty());
            }
        }
        3 => drop(docker::event(answer)),
        4 => {
            if let Ok(attached) = cni::parse(answer) {
                assert!(attached.netns.is_absolute() && !attached.container.contains('/'));
            }
        }
        5 => {
            for (id, container) in containerd::containers(answer).unwrap_or_default() {
                assert!(!id.is_empty() && !id.contains('/'));
                short(bytes(container.labels.iter()));
            }
        }
        6 => {
            let tasks = containerd::tasks(answer).unwrap_or_default();
            assert!(tasks.values().all(|task| *task != containerd::Task::Running(0)));
        }
        _ => drop(containerd::namespace_of_event(answer)),
    }
}

fn bytes<'a>(labels: impl Iterator<Item = (&'a String, &'a String)>) -> usize {
    labels.map(|(key, value)| key.len() + value.len()).sum()
}
