//! Cuts a stream of bytes into JSON texts.
//!
//! Clients separate requests by line ends, by nothing at all, or spread one over several lines; so
//! a text ends where its brackets close. What can't be the start of a request is garbage up to the
//! end of its line. Each byte is looked at once, and a text has at most [`MAX_LENGTH`] bytes.

/// Longest request, in bytes. Ours are far shorter; QEMU takes 64 MiB.
pub(super) const MAX_LENGTH: usize = 1 << 20;

/// Deepest nesting; `serde_json` stops at 128 by itself.
const MAX_DEPTH: usize = 100;

/// What the stream contained.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A text with balanced brackets; may still be wrong inside.
    Text(Vec<u8>),
    /// Not JSON; the reason. The rest of the line is skipped.
    Garbage(&'static str),
    /// Longer than allowed: the connection can't be used any further.
    TooLong,
}

#[derive(Default)]
pub(super) struct Framer {
    text: Vec<u8>,
    /// The brackets that will close what is open.
    open: Vec<u8>,
    in_string: bool,
    escaped: bool,
    skipping: bool,
}

impl Framer {
    /// Takes bytes and hands out each frame that they complete.
    pub(super) fn push(&mut self, bytes: &[u8], mut emit: impl FnMut(Frame)) {
        for &byte in bytes {
            if let Some(frame) = self.step(byte) {
                let end = frame == Frame::TooLong;
                emit(frame);
                if end {
                    return;
                }
            }
        }
    }

    fn step(&mut self, byte: u8) -> Option<Frame> {
        if self.skipping {
            self.skipping = byte != b'\n';
            return None;
        }
        if self.text.is_empty() {
            return match byte {
                b' ' | b'\t' | b'\r' | b'\n' => None,
                b'{' => self.opened(byte, b'}'),
                b'[' => self.opened(byte, b']'),
                _ => self.garbage("expecting an object", byte),
            };
        }
        if self.text.len() >= MAX_LENGTH {
            return Some(Frame::TooLong);
        }
        if self.in_string {
            if byte == b'\n' {
                return self.garbage("a line ends inside a string", byte);
            }
            self.text.push(byte);
            if self.escaped {
                self.escaped = false;
            } else {
                self.escaped = byte == b'\\';
                self.in_string = byte != b'"';
            }
            return None;
        }
        match byte {
            b'{' => self.opened(byte, b'}'),
            b'[' => self.opened(byte, b']'),
            b'}' | b']' if self.open.last() != Some(&byte) => {
                self.garbage("a bracket closes what is not open", byte)
            }
            b'}' | b']' => {
                self.open.pop();
                self.text.push(byte);
                self.open.is_empty().then(|| Frame::Text(std::mem::take(&mut self.text)))
            }
            _ => {
                self.in_string = byte == b'"';
                self.text.push(byte);
                None
            }
        }
    }

    fn opened(&mut self, byte: u8, closing: u8) -> Option<Frame> {
        if self.open.len() >= MAX_DEPTH {
            return self.garbage("nested too deeply", byte);
        }
        self.text.push(byte);
        self.open.push(closing);
        None
    }

    fn garbage(&mut self, why: &'static str, byte: u8) -> Option<Frame> {
        *self = Self { skipping: byte != b'\n', ..Self::default() };
        Some(Frame::Garbage(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(input: &[u8]) -> Vec<Frame> {
        let mut all = Vec::new();
        Framer::default().push(input, |frame| all.push(frame));
        all
    }

    fn text(s: &str) -> Frame {
        Frame::Text(s.as_bytes().to_vec())
    }

    #[test]
    fn texts_end_where_their_brackets_close() {
        assert_eq!(
            frames(br#"{"a":"}\"]"}[1] {"b":{}}"#),
            [text(r#"{"a":"}\"]"}"#), text("[1]"), text(r#"{"b":{}}"#)]
        );
        assert_eq!(frames(b"{\n \"a\": 1\n}\r\n"), [text("{\n \"a\": 1\n}")]);
        assert_eq!(frames(b"{\"a\""), []);
    }

    #[test]
    fn any_cut_gives_the_same_frames() {
        let input = b"{\"execute\":\"stop\"}\r\nnonsense{\n{\"x\":[1,{}]}{]\n[\"a\nb\"]\n{}";
        let whole = frames(input);
        for cut in 0..input.len() {
            let (mut framer, mut all) = (Framer::default(), Vec::new());
            for part in [&input[..cut], &input[cut..]] {
                framer.push(part, |frame| all.push(frame));
            }
            assert_eq!(all, whole, "cut at {cut}");
        }
    }

    #[test]
    fn garbage_ends_with_its_line() {
        let got = frames(b"GET / HTTP/1.1\n{}");
        assert_eq!(got, [Frame::Garbage("expecting an object"), text("{}")]);
        assert_eq!(frames(b"{\"a\n{}").len(), 2);
        assert_eq!(frames(b"{]\n{}").len(), 2);
        assert!(matches!(
            frames("[".repeat(101).as_bytes())[..],
            [Frame::Garbage("nested too deeply")]
        ));
    }

    #[test]
    fn length_is_bounded() {
        let mut input = vec![b' '; MAX_LENGTH + 1];
        input[0] = b'{';
        assert_eq!(frames(&input), [Frame::TooLong]);
    }
}
