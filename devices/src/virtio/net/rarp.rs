//! The frame by which a machine tells switches where its address is now.

/// A RARP request (RFC 903) from `mac` about itself, padded to the shortest Ethernet frame.
pub fn rarp_frame(mac: [u8; 6]) -> [u8; 60] {
    let mut frame = [0; 60];
    let fields: [&[u8]; 11] = [
        &[0xff; 6],    // to everyone
        &mac,          // from this machine
        &[0x80, 0x35], // RARP
        &[0, 1],       // hardware: Ethernet
        &[0x08, 0x00], // protocol: IPv4
        &[6, 4],       // their addresses' lengths
        &[0, 3],       // request reverse
        &mac,          // sender
        &[0; 4],
        &mac, // target
        &[0; 4],
    ];
    for (to, from) in frame.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    frame
}
