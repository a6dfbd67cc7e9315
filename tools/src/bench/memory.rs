//! How much memory a VMM uses beside its guest's RAM.
//!
//! `/proc/PID/smaps` lists every mapping with what of it is in memory. Guest RAM is the largest
//! mapping (or the two largest, where RAM is split around the PCI hole): those are left out, and the
//! rest is summed up. What the kernel keeps for the process (page tables, KVM's own) is not in it,
//! for none of the rivals.

/// What a process has in memory beside guest RAM, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BesideRam {
    /// Proportional set size: a page that `n` processes share counts one `n`th.
    pub pss: u64,
    /// Resident set size: a shared page counts in full.
    pub rss: u64,
}

/// A mapping may be a little larger than the RAM in it: guard pages, alignment.
const SLACK: u64 = 4 << 20;

#[derive(Default)]
struct Mapping {
    size: u64,
    pss: u64,
    rss: u64,
}

/// Reads the text of an `smaps` file of a process whose guest has `ram` bytes. `None` if guest RAM
/// cannot be told from the rest.
pub fn beside_ram(smaps: &str, ram: u64) -> Option<BesideRam> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let (key, rest) = line.split_once(' ')?;
        match key.strip_suffix(':') {
            None => mappings.push(Mapping::default()),
            Some(key @ ("Size" | "Pss" | "Rss")) => {
                let bytes = rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10;
                let mapping = mappings.last_mut()?;
                match key {
                    "Size" => mapping.size = bytes,
                    "Pss" => mapping.pss = bytes,
                    _ => mapping.rss = bytes,
                }
            }
            Some(_) => {}
        }
    }
    mappings.sort_by_key(|mapping| std::cmp::Reverse(mapping.size));
    let mut left_out = 0;
    let mut rest = mappings.iter();
    while left_out < ram {
        left_out += rest.next()?.size;
    }
    if left_out > ram + SLACK {
        return None;
    }
    let mut sum = BesideRam { pss: 0, rss: 0 };
    for mapping in rest {
        sum.pss += mapping.pss;
        sum.rss += mapping.rss;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(size_kb: u64, rss_kb: u64, pss_kb: u64) -> String {
        format!(
            "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 [anon: x]\nSize: {size_kb:12} kB\n\
             KernelPageSize:        4 kB\nRss: {rss_kb:10} kB\nPss: {pss_kb:10} kB\n\
             Pss_Dirty:             7 kB\nVmFlags: rd wr mr hg \n"
        )
    }

    #[test]
    fn guest_ram_is_left_out_and_the_rest_summed_up() {
        let text = mapping(132, 100, 50) + &mapping(65536, 60000, 60000) + &mapping(8, 8, 2);
        let found = beside_ram(&text, 64 << 20).unwrap();
        assert_eq!(found, BesideRam { pss: 52 << 10, rss: 108 << 10 });
    }

    #[test]
    fn ram_in_two_pieces_is_left_out_as_well() {
        let text = mapping(3 << 20, 1, 1) + &mapping(2 << 20, 1, 1) + &mapping(64, 64, 64);
        assert_eq!(beside_ram(&text, 5 << 30).unwrap().pss, 64 << 10);
    }

    #[test]
    fn what_cannot_be_told_apart_is_not_guessed() {
        assert_eq!(beside_ram(&mapping(1024, 1, 1), 64 << 20), None);
        assert_eq!(beside_ram(&mapping(1 << 20, 1, 1), 64 << 20), None);
        assert_eq!(beside_ram("", 1), None);
    }
}
