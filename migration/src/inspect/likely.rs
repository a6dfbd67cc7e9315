//! What a broken stream comes from, mostly, in the words that QEMU's users search for.

use crate::wire::WireError;

/// The likely cause of an error in a stream that was read from a file or a pipe.
pub fn likely_cause(error: &WireError) -> &'static str {
    match error {
        WireError::NotAStream { .. } => {
            "not a migration stream: a disk image, a compressed or encrypted file, or an `offset=` \
             that is missing"
        }
        WireError::StreamVersion { .. } => "a stream of another format than QEMU's since 2006",
        WireError::ConfigurationMissing { .. } => {
            "a source with `-global migration.send-configuration=off`, or a machine type older \
             than 2.4"
        }
        WireError::BrokenOff { .. } => {
            "the source or the connection ended in the middle (\"load of migration failed: \
             Input/output error\"): look for the source's reason; or the disk was full when this \
             was saved"
        }
        WireError::FooterMissing { .. } | WireError::FooterId { .. } => {
            "\"Missing section footer\": the reader and the writer of this section disagree on its \
             fields, as two versions of a program or of a machine type do"
        }
        WireError::TooLarge { .. } | WireError::Json { .. } => {
            "bytes that were changed, or a reader that lost its place some sections before"
        }
        WireError::Unsupported { .. } => "a capability that was switched on at the source",
        WireError::Unexpected { what, .. } => match *what {
            "a RAM record" => {
                "\"Unknown ramblock\" or \"Illegal RAM offset\": bytes that were changed, or a \
                 reader that lost its place"
            }
            "the flags of a RAM record" => {
                "\"Unknown combination of migration flags\": bytes that were changed, or a newer \
                 QEMU with a capability switched on"
            }
            "the type of the next section" => {
                "\"Unknown savevm section type\": the section before has more fields than its \
                 description says, or bytes were changed"
            }
            _ => "bytes that were changed, or a writer newer than this reader",
        },
    }
}
