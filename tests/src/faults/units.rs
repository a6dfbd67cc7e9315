//! Takes the bytes of a migration apart, as they come, into the pieces between which something can go
//! wrong. It knows just enough for that (`docs/migration.md`), and believes the sender.

/// A piece of the stream, with all its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// What it is: `manifest`, `page`, `section timer`, …
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Bytes of a page.
const PAGE: usize = 4096;

/// Bytes of the connection in one direction that are not taken apart yet.
#[derive(Debug)]
pub struct Splitter {
    held: Vec<u8>,
    at: usize,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// From the destination.
    Back,
    Header,
    Configuration,
    /// Between sections.
    Parts,
    /// Among the records of the RAM section.
    Records,
    /// Something that is not known: all that comes is one piece.
    Lost,
}

/// More bytes are needed to tell.
struct Short;

impl Splitter {
    /// For what a source sends.
    pub fn there() -> Self {
        Self { held: Vec::new(), at: 0, state: State::Header }
    }

    /// For what a destination answers.
    pub fn back() -> Self {
        Self { held: Vec::new(), at: 0, state: State::Back }
    }

    /// Takes bytes, and gives the pieces that are complete with them.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Unit> {
        self.held.drain(..self.at);
        self.at = 0;
        self.held.extend_from_slice(bytes);
        let mut units = Vec::new();
        while let Ok((name, len)) = self.next() {
            let end = self.at + len;
            units.push(Unit { name, bytes: self.held[self.at..end].to_vec() });
            self.at = end;
        }
        units
    }

    /// What has come of a piece that is not complete.
    pub fn rest(&mut self) -> Vec<u8> {
        let rest = self.held.split_off(self.at);
        self.held.clear();
        self.at = 0;
        rest
    }

    fn slice(&self, from: usize, len: usize) -> Result<&[u8], Short> {
        self.held.get(self.at + from..self.at + from + len).ok_or(Short)
    }

    fn number(&self, from: usize, len: usize) -> Result<usize, Short> {
        Ok(self.slice(from, len)?.iter().fold(0, |n, byte| n << 8 | usize::from(*byte)))
    }

    /// A name with its length in front, at `from`: where it ends, and what it is.
    fn text(&self, from: usize) -> Result<(usize, String), Short> {
        let len = self.number(from, 1)?;
        let text = String::from_utf8_lossy(self.slice(from + 1, len)?).into_owned();
        Ok((from + 1 + len, text))
    }

    fn next(&mut self) -> Result<(String, usize), Short> {
        if self.at == self.held.len() {
            return Err(Short);
        }
        let (name, len) = match self.state {
            State::Back => self.message()?,
            State::Header => ("header".to_owned(), 8),
            State::Configuration => ("configuration".to_owned(), 5 + self.number(1, 4)?),
            State::Parts => self.part()?,
            State::Records => self.record()?,
            State::Lost => ("unknown".to_owned(), self.held.len() - self.at),
        };
        self.slice(0, len)?;
        self.state = match (self.state, name.as_str()) {
            (State::Header, _) => State::Configuration,
            (State::Configuration, _) => State::Parts,
            (_, "ram start" | "ram part" | "ram end") => State::Records,
            (State::Records, "ram footer") => State::Parts,
            (_, "unknown") => State::Lost,
            (state, _) => state,
        };
        Ok((name, len))
    }

    /// A message of the destination's.
    fn message(&self) -> Result<(String, usize), Short> {
        let name = match self.number(0, 2)? {
            1 => "shut",
            2 => "pong",
            0x4d01 => "hello",
            0x4d02 => "verdict",
            0x4d03 => "prepared",
            0x4d04 => "failed",
            0x4d05 => "fate",
            0x4d06 => "running",
            _ => return self.unknown(),
        };
        let short = matches!(name, "shut" | "pong");
        let json = if short { 0 } else { self.number(4, 4)? };
        Ok((name.to_owned(), 8 + json))
    }

    fn unknown(&self) -> Result<(String, usize), Short> {
        Ok(("unknown".to_owned(), self.held.len() - self.at))
    }

    /// Something between sections, or the beginning of a part of RAM.
    fn part(&self) -> Result<(String, usize), Short> {
        match self.number(0, 1)? {
            0 => Ok(("end".to_owned(), 1)),
            1 => Ok(("ram start".to_owned(), self.text(5)?.0 + 8)),
            2 => Ok(("ram part".to_owned(), 5)),
            3 => Ok(("ram end".to_owned(), 5)),
            4 => self.section(),
            6 => Ok(("description".to_owned(), 5 + self.number(1, 4)?)),
            8 => self.command(),
            _ => self.unknown(),
        }
    }

    fn command(&self) -> Result<(String, usize), Short> {
        let (number, len) = (self.number(1, 2)?, self.number(3, 2)?);
        let name = match number {
            1 => "open return path",
            2 => "ping",
            0x4d01 => "manifest",
            0x4d02 => "verify",
            0x4d03 => "commit",
            0x4d04 => "abort",
            0x4d07 => "settled",
            _ => return self.unknown(),
        };
        let json = if number > 0x4d00 { self.number(5, 4)? } else { 0 };
        Ok((name.to_owned(), 5 + len + json))
    }

    /// A device's section: it has no length, but a footer with its number, and another part's type
    /// behind that.
    fn section(&self) -> Result<(String, usize), Short> {
        let (body, mut name) = self.text(5)?;
        let instance = self.number(body, 4)?;
        if instance != 0 {
            name += &format!(" {instance}");
        }
        let mut footer = vec![0x7e];
        footer.extend_from_slice(self.slice(1, 4)?);
        let rest = self.held.get(self.at + body + 8..).ok_or(Short)?;
        let ends = |window: &[u8]| window.starts_with(&footer) && matches!(window[5], 0 | 4 | 8);
        let end = rest.windows(6).position(ends).ok_or(Short)?;
        Ok((format!("section {name}"), body + 8 + end + 5))
    }

    /// A record of RAM, or the footer behind the last one.
    fn record(&self) -> Result<(String, usize), Short> {
        if self.number(0, 1)? == 0x7e {
            return Ok(("ram footer".to_owned(), 5));
        }
        let flags = self.number(0, 8)? & (PAGE - 1);
        let content = || if flags & 0x20 == 0 { Ok(self.text(8)?.0) } else { Ok(8) };
        match flags & !0x20 {
            0x02 => Ok(("zero page".to_owned(), content()? + 1)),
            0x08 => Ok(("page".to_owned(), content()? + PAGE)),
            // Many that follow each other.
            0x402 => Ok(("zero pages".to_owned(), content()? + 5)),
            0x408 => {
                let count = content()?;
                Ok(("pages".to_owned(), count + 4 + self.number(count, 4)? * PAGE))
            }
            0x10 => Ok(("ram mark".to_owned(), 8)),
            0x04 => {
                let mut left = self.number(0, 8)? & !(PAGE - 1);
                let mut end = 8;
                while left > 0 {
                    end = self.text(end)?.0 + 8;
                    left = left.saturating_sub(self.number(end - 8, 8)?.max(1));
                }
                Ok(("ram blocks".to_owned(), end))
            }
            _ => self.unknown(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Vec<u8> {
        let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc".to_vec();
        out.extend_from_slice(b"\x08\0\x01\0\0\x08\0\x02\0\x04mvmm");
        out.extend_from_slice(b"\x08\x4d\x01\0\x04\0\0\0\x02{}");
        out.extend_from_slice(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
        out.extend_from_slice(b"\0\0\0\0\0\0\x20\x04\x06pc.ram\0\0\0\0\0\0\x20\0");
        out.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
        out.extend_from_slice(b"\x02\0\0\0\x02\0\0\0\0\0\0\0\x08\x06pc.ram");
        out.extend_from_slice(&[7; PAGE]);
        out.extend_from_slice(b"\0\0\0\0\0\0\x10\x22\0\0\0\0\0\0\0\x14\x28\0\0\0\x02");
        out.extend_from_slice(&[8; 2 * PAGE]);
        out.extend_from_slice(b"\0\0\0\0\0\0\x14\x22\0\0\0\x03\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
        out.extend_from_slice(
            b"\x04\0\0\0\x03\x05i8259\0\0\0\x01\0\0\0\x01abc\x7e\0\x7e\0\0\0\x03",
        );
        out.extend_from_slice(b"\0\x06\0\0\0\x02{}\x08\x4d\x03\0\x04\0\0\0\x02{}");
        out
    }

    const NAMES: [&str; 20] = [
        "header",
        "configuration",
        "open return path",
        "ping",
        "manifest",
        "ram start",
        "ram blocks",
        "ram mark",
        "ram footer",
        "ram part",
        "page",
        "zero page",
        "pages",
        "zero pages",
        "ram mark",
        "ram footer",
        "section i8259 1",
        "end",
        "description",
        "commit",
    ];

    #[test]
    fn a_stream_falls_into_its_pieces_however_it_comes() {
        let stream = stream();
        for step in [1, 2, 7, 1000, stream.len()] {
            let mut splitter = Splitter::there();
            let units: Vec<_> = stream.chunks(step).flat_map(|c| splitter.push(c)).collect();
            let names: Vec<_> = units.iter().map(|u| u.name.as_str()).collect();
            assert_eq!(names, NAMES, "in steps of {step}");
            assert_eq!(units.iter().flat_map(|u| u.bytes.clone()).collect::<Vec<_>>(), stream);
            assert!(splitter.rest().is_empty());
        }
    }

    #[test]
    fn answers_fall_into_messages_and_a_rest_is_kept() {
        let mut splitter = Splitter::back();
        let bytes = b"\x4d\x01\0\x04\0\0\0\x02{}\0\x02\0\x04\0\0\0\0\0\x01\0";
        let names: Vec<_> = splitter.push(bytes).into_iter().map(|u| u.name).collect();
        assert_eq!(names, ["hello", "pong"]);
        assert_eq!(splitter.rest(), b"\0\x01\0");
        assert!(splitter.rest().is_empty());
    }

    #[test]
    fn what_is_not_known_passes_as_it_comes() {
        let mut splitter = Splitter::back();
        let units = splitter.push(b"\x7f\xff\0\x04ab");
        assert_eq!((units[0].name.as_str(), units[0].bytes.len()), ("unknown", 6));
        assert_eq!(splitter.push(b"\0\x01")[0].bytes, b"\0\x01");
    }
}
