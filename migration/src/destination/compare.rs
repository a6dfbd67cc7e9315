//! Would the source's VM fit: its manifest against this machine, every problem at once.

use std::collections::{BTreeMap, BTreeSet};

use crate::guest::DestinationVm;
use crate::manifest::{Manifest, Problem};
use crate::vmstate::{Section, SectionId};

fn problem(
    code: &str,
    what: impl Into<String>,
    expected: impl ToString,
    found: impl ToString,
    hint: impl Into<String>,
) -> Problem {
    Problem {
        code: code.to_owned(),
        what: what.into(),
        expected: expected.to_string(),
        found: found.to_string(),
        hint: hint.into(),
    }
}

/// Everything that stands against a migration of the manifest's VM to `vm`, whose sections are
/// `sections`.
pub fn compare(
    vm: &mut dyn DestinationVm,
    sections: &[Box<dyn Section>],
    manifest: &Manifest,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    if vm.machine_type() != manifest.machine {
        problems.push(problem(
            "machine-type",
            "machine type",
            vm.machine_type(),
            &manifest.machine,
            format!("start the destination with --machine {}", manifest.machine),
        ));
    }
    if vm.vcpus() != manifest.vcpus {
        problems.push(problem(
            "vcpus",
            "number of vCPUs",
            vm.vcpus(),
            manifest.vcpus,
            format!("start the destination with --smp {}", manifest.vcpus),
        ));
    }
    compare_ram(vm, manifest, &mut problems);
    compare_sections(sections, manifest, &mut problems);
    problems.extend(vm.check_details(&manifest.details));
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
                problems.push(problem("ram-block", what, "it once", "it twice", ""));
            }
            None if vm.accept_block(block) => {}
            None => problems.push(problem(
                "ram-block",
                what,
                "none of that name",
                format!("{} bytes", block.len),
                "give the destination the same devices",
            )),
            Some(len) if *len != block.len => problems.push(problem(
                "ram-size",
                what,
                format!("{len} bytes"),
                format!("{} bytes", block.len),
                format!("start the destination with --memory {}M", block.len >> 20),
            )),
            Some(_) => {}
        }
    }
    for (name, len) in &ours {
        if !seen.contains(name) {
            problems.push(problem(
                "ram-block",
                format!("RAM block {name}"),
                format!("{len} bytes"),
                "none of that name",
                "give both sides the same devices",
            ));
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
            problems.push(problem(
                "device",
                what,
                "no such device",
                format!("it, version {}", theirs.version),
                "give the destination the same devices in the same slots",
            ));
            continue;
        };
        let (min, max) = (section.min_version(), section.version());
        if !(min..=max).contains(&theirs.version) {
            problems.push(problem(
                "device-version",
                what.clone(),
                format!("versions {min} to {max}"),
                format!("version {}", theirs.version),
                "use the same version of mini-vmm on both sides",
            ));
        }
        let layout = format!("{:016x}", section.layout_digest());
        if theirs.version == max && !theirs.layout.is_empty() && theirs.layout != layout {
            problems.push(problem(
                "device-layout",
                what,
                format!("layout {layout} of version {max}"),
                format!("layout {}", theirs.layout),
                "use the same version of mini-vmm on both sides",
            ));
        }
        seen.insert(id);
    }
    for id in ours.keys() {
        if !seen.contains(id) {
            problems.push(problem(
                "device",
                format!("device section {id}"),
                "it",
                "no such device",
                "give both sides the same devices in the same slots",
            ));
        }
    }
}
