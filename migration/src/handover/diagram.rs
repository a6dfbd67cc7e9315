//! The state diagram in ARCHITECTURE.md is the machines' own.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fmt::Debug;
use std::hash::Hash;

use super::destination::Destination;
use super::source::{Event as SEvent, Source};
use super::tests::{DESTINATION_EVENTS, SOURCE_EVENTS};
use super::{Arbiter, Peer};

/// Every transition that changes the state, from the first state on: a line for each pair of
/// states.
fn lines<M: Clone + Eq + Hash, E: Copy>(
    first: M,
    events: &[E],
    on: impl Fn(&mut M, E),
    state: impl Fn(&M) -> String,
    name: impl Fn(E) -> String,
) -> String {
    let mut seen = HashSet::from([first.clone()]);
    let mut queue = VecDeque::from([first]);
    let mut out = String::new();
    while let Some(machine) = queue.pop_front() {
        let mut by_target: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for event in events {
            let mut next = machine.clone();
            on(&mut next, *event);
            if state(&next) != state(&machine) {
                let names = by_target.entry(state(&next)).or_default();
                if !names.contains(&name(*event)) {
                    names.push(name(*event));
                }
            }
            if seen.insert(next.clone()) {
                queue.push_back(next);
            }
        }
        for (target, names) in by_target {
            out += &format!("    {} --> {target} : {}\n", state(&machine), names.join(", "));
        }
    }
    out
}

/// A value's name, without its fields unless they are true.
fn short(value: &dyn Debug) -> String {
    let text = format!("{value:?}");
    match text.split_once(" { ") {
        None => text,
        Some((name, fields)) => {
            let fields = fields.trim_end_matches(" }").split(", ");
            let set: Vec<_> = fields.filter_map(|f| f.strip_suffix(": true")).collect();
            match set.is_empty() {
                true => name.to_owned(),
                false => format!("{name}({})", set.join("+")),
            }
        }
    }
}

fn diagram() -> String {
    let state = |text: String| text.replace(['(', ')'], "_").trim_end_matches('_').to_owned();
    let source = lines(
        Source::new(Peer::MiniVmm, Arbiter::DiskLocks).fenced(),
        // With disks, to say twice what they show changes nothing.
        &SOURCE_EVENTS.map(|e| match e {
            SEvent::ResumeHere { even_changed, .. } => {
                SEvent::ResumeHere { known_dead: false, even_changed }
            }
            other => other,
        }),
        |machine, event| {
            machine.on(event);
        },
        |machine| state(short(&machine.state())),
        |event| short(&event),
    );
    let destination = lines(
        Destination::new(Peer::MiniVmm),
        &DESTINATION_EVENTS,
        |machine, event| {
            machine.on(event);
        },
        |machine| format!("{:?}", machine.state()),
        |event| format!("{event:?}"),
    );
    format!(
        "```mermaid\nstateDiagram-v2\n    [*] --> Running\n{source}```\n\n\
         ```mermaid\nstateDiagram-v2\n    [*] --> Receiving\n{destination}```\n"
    )
}

#[test]
fn architecture_md_draws_the_machines_as_they_are() {
    let text = include_str!("../../../ARCHITECTURE.md");
    let expected = diagram();
    assert!(text.contains(&expected), "ARCHITECTURE.md has to say:\n\n{expected}");
}
