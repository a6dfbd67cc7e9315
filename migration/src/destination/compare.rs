//! Would the source's VM fit: its manifest against this machine, every problem at once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::guest::DestinationVm;
use crate::manifest::Manifest;
use crate::problem::{Problem, kind};
use crate::vmstate::{Section, SectionId};

/// How far the hosts' clocks may be apart before it is worth a word.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(1);

/// Everything that stands against a migration of the manifest's VM to `vm`, whose sections are
/// `sections`.
pub fn compare(
    vm: &mut dyn DestinationVm,
    sections: &[Box<dyn Section>],
    manifest: &Manifest,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    if vm.machine_type() != manifest.machine {
        problems.push(
            Problem::new(
                kind::MACHINE_TYPE,
                "machine type",
                vm.machine_type(),
                &manifest.machine,
                format!("start the destination with --machine {}", manifest.machine),
            )
            .of("", "machine")
            .known_as(format!(
                "Machine type received is '{}' and local is '{}'",
                manifest.machine,
                vm.machine_type()
            )),
        );
    }
    if vm.vcpus() != manifest.vcpus {
        problems.push(
            Problem::new(
                kind::VCPUS,
                "number of vCPUs",
                vm.vcpus(),
                manifest.vcpus,
                format!("start the destination with --smp {}", manifest.vcpus),
            )
            .of("", "smp"),
        );
    }
    compare_ram(vm, manifest, &mut problems);
    compare_sections(sections, manifest, &mut problems);
    problems.extend(vm.check_details(&manifest.details));
    problems.extend(compare_clocks(manifest, SystemTime::now()));
    problems
}

fn compare_ram(vm: &mut dyn DestinationVm, manifest: &Manifest, problems: &mut Vec<Problem>) {
    let ours: BTreeMap<String, u64> =
        vm.ram().blocks().into_iter().map(|b| (b.name, b.len)).collect();
    let mut seen = BTreeSet::new();
    for block in &manifest.ram {
        let what = format!("RAM block {}", block.name);
        match ours.get(&block.name) {
            _ if !seen.insert(&block.name) => {
                let twice = Problem::new(kind::RAM_BLOCK, what, "it once", "it twice", "");
                problems.push(twice.of(&block.name, "name"));
            }
            None if vm.accept_block(block) => {}
            None => problems.push(
                Problem::new(
                    kind::RAM_BLOCK,
                    what,
                    "none of that name",
                    format!("{} bytes", block.len),
                    "give the destination the same devices",
                )
                .of(&block.name, "name")
                .known_as(format!("Unknown ramblock \"{}\", cannot accept migration", block.name)),
            ),
            Some(len) if *len != block.len => problems.push(
                Problem::new(
                    kind::RAM_SIZE,
                    what,
                    format!("{len} bytes"),
                    format!("{} bytes", block.len),
                    format!("start the destination with --memory {}M", block.len >> 20),
                )
                .of(&block.name, "size")
                .known_as(format!(
                    "Length mismatch: {}: {:#x} in != {len:#x}",
                    block.name, block.len
                )),
            ),
            Some(_) => {}
        }
    }
    for (name, len) in &ours {
        if !seen.contains(name) {
            problems.push(
                Problem::new(
                    kind::RAM_BLOCK,
                    format!("RAM block {name}"),
                    format!("{len} bytes"),
                    "none of that name",
                    "give both sides the same devices",
                )
                .of(name, "name")
                .known_as(""),
            );
        }
    }
}

fn compare_sections(
    sections: &[Box<dyn Section>],
    manifest: &Manifest,
    problems: &mut Vec<Problem>,
) {
    let ours: BTreeMap<SectionId, &Box<dyn Section>> =
        sections.iter().map(|s| (s.id(), s)).collect();
    let mut seen = BTreeSet::new();
    for theirs in &manifest.sections {
        let id = SectionId::new(theirs.id.clone(), theirs.instance);
        let what = format!("device section {id}");
        let Some(section) = ours.get(&id) else {
            problems.push(
                Problem::new(
                    kind::DEVICE_MISSING,
                    what,
                    "no such device",
                    format!("it, version {}", theirs.version),
                    "give the destination the same devices in the same slots",
                )
                .of(id.to_string(), "section")
                .known_as(format!(
                    "Unknown savevm section or instance '{}' {}",
                    id.idstr, id.instance
                )),
            );
            continue;
        };
        let (min, max) = (section.min_version(), section.version());
        if !(min..=max).contains(&theirs.version) {
            problems.push(
                Problem::new(
                    kind::DEVICE_VERSION,
                    what.clone(),
                    format!("versions {min} to {max}"),
                    format!("version {}", theirs.version),
                    "use the same version of mini-vmm on both sides",
                )
                .of(id.to_string(), "version"),
            );
        }
        let layout = format!("{:016x}", section.layout_digest());
        if theirs.version == max && !theirs.layout.is_empty() && theirs.layout != layout {
            problems.push(
                Problem::new(
                    kind::DEVICE_LAYOUT,
                    what,
                    format!("layout {layout} of version {max}"),
                    format!("layout {}", theirs.layout),
                    "use the same version of mini-vmm on both sides",
                )
                .of(id.to_string(), "layout")
                .known_as(format!("Missing section footer for {}", id.idstr)),
            );
        }
        seen.insert(id);
    }
    for id in ours.keys() {
        if !seen.contains(id) {
            problems.push(
                Problem::new(
                    kind::DEVICE_EXTRA,
                    format!("device section {id}"),
                    "it",
                    "no such device",
                    "give both sides the same devices in the same slots",
                )
                .of(id.to_string(), "section"),
            );
        }
    }
}

/// Both sides' wall clocks. What the message took on its way counts as a difference too, and is far
/// below what matters.
fn compare_clocks(manifest: &Manifest, now: SystemTime) -> Option<Problem> {
    let now_ms = u64::try_from(now.duration_since(UNIX_EPOCH).ok()?.as_millis()).ok()?;
    let apart = Duration::from_millis(now_ms.abs_diff(manifest.sent_at_ms));
    if manifest.sent_at_ms == 0 || apart <= CLOCK_TOLERANCE {
        return None;
    }
    let ahead = if now_ms > manifest.sent_at_ms { "ahead" } else { "behind" };
    let problem = Problem::new(
        kind::CLOCK_DIFFERENCE,
        "the hosts' clocks",
        format!("{now_ms} ms since 1970, {:.1} s {ahead}", apart.as_secs_f64()),
        format!("{} ms", manifest.sent_at_ms),
        "let both hosts follow the same time server (chrony, ntpd), or the guest's time may jump",
    );
    Some(problem.of("", "clock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_may_differ_a_little_and_a_source_need_not_tell() {
        let now = UNIX_EPOCH + Duration::from_millis(1_000_000);
        let case = |sent_at_ms| {
            let mut manifest: Manifest = serde_json::from_value(serde_json::json!({
                "protocol": 1, "program": "", "machine": "", "vcpus": 1, "ram": [], "sections": []
            }))
            .unwrap();
            manifest.sent_at_ms = sent_at_ms;
            compare_clocks(&manifest, now)
        };
        assert_eq!(case(0), None);
        assert_eq!(case(999_500), None);
        let behind = case(1_010_000).unwrap();
        assert!(!behind.fatal && behind.expected.contains("10.0 s behind"), "{behind}");
        assert!(case(900_000).unwrap().expected.contains("100.0 s ahead"));
        assert!(case(u64::MAX).is_some());
    }
}
