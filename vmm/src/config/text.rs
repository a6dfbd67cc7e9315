//! Values that are written as text, in files and flags alike.

/// `Serialize` by `Display` and `Deserialize` by `FromStr`, so that a word means the same everywhere.
macro_rules! as_text {
    ($type:ty, $expected:literal) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl serde::de::Visitor<'_> for Text {
                    type Value = $type;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str($expected)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Text)
            }
        }
    };
}

as_text!(super::ByteSize, "a size in quotes, like \"512M\" or \"2G\"");
as_text!(super::HumanDuration, "a time in quotes, like \"300ms\"");
as_text!(super::Rate, "a rate in quotes, like \"100M\" or \"1Gbit\"");
as_text!(super::SocketUri, "an address in quotes, like \"tcp:host:4444\" or \"unix:/run/m.sock\"");
as_text!(
    super::MigrateListen,
    "an address in quotes, like \"tcp:0.0.0.0:4444\" or \"file:vm.mig\", or \"defer\""
);
as_text!(super::MachineType, "a machine type in quotes, like \"pc-i440fx-7.2\"");
as_text!(super::CpuConfig, "a CPU model in quotes, like \"host\" or \"x86-64-v2\"");
as_text!(super::PciSlot, "a PCI slot in quotes, in hexadecimal like \"05.0\"");
as_text!(super::MacAddr, "a MAC address in quotes, like \"52:54:00:12:34:56\"");
as_text!(super::VmName, "a name in quotes");
as_text!(
    super::CharBackend,
    "a backend in quotes, like \"stdio\", \"pty\" or \"unix:/run/s.sock\""
);
as_text!(super::DiskCache, "\"writeback\" or \"none\"");
as_text!(super::VirtioVersion, "\"transitional\", \"modern\" or \"legacy\"");
as_text!(super::QmpSocket, "a socket in quotes, like \"unix:/run/qmp.sock\"");
