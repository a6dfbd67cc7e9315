//! What the disks of a guest that is gone from here tell about it: who holds them, and whether they
//! have been written to.

use std::io;
use std::path::PathBuf;

use devices::virtio::{BackendError, DiskImage, ImageHolder, ImageInUse, ImageStamp};
use migration::guest::Holder;
use serde_json::Value;

/// Disks as they were when they were given up.
#[derive(Debug, Default)]
pub(crate) struct LeftDisks(Vec<(DiskImage, io::Result<ImageStamp>)>);

impl LeftDisks {
    /// Notes how those are that the guest may write to.
    pub(super) fn note(images: &[DiskImage]) -> Self {
        let written = images.iter().filter(|image| !image.readonly);
        Self(written.map(|image| (image.clone(), image.stamp())).collect())
    }

    /// For the destination.
    pub(super) fn to_json(&self) -> Value {
        let stamps: Vec<_> = self.0.iter().filter_map(|(_, left)| left.as_ref().ok()).collect();
        // Times before 1970 have no JSON form; nothing is said then.
        serde_json::to_value(stamps).unwrap_or_default()
    }

    /// Makes the source's word on how they were left untrue, so that no order that relies on it is good
    /// any more.
    pub(super) fn touch(&self) -> io::Result<()> {
        self.0.iter().try_for_each(|(image, _)| image.touch())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first that is not as it was left, as a sentence. One that can't be looked at counts.
    pub(super) fn changed(&self) -> Option<String> {
        self.0.iter().find_map(|(image, left)| {
            let path = image.path.display();
            match (left, image.stamp()) {
                (Ok(left), Ok(now)) if *left == now => None,
                (Ok(left), Ok(now)) => {
                    let later = now.written.duration_since(left.written).unwrap_or_default();
                    Some(format!(
                        "the disk image {path} has been written to since this side gave it up, \
                         {:.1} s after its last write here",
                        later.as_secs_f64()
                    ))
                }
                (Err(e), _) => Some(format!(
                    "it is not known whether the disk image {path} has been written to: {e}"
                )),
                (_, Err(e)) => Some(format!(
                    "it is not known whether the disk image {path} has been written to: {e}"
                )),
            }
        })
    }
}

/// Whether a disk could not be opened because another virtual machine holds it.
pub(super) fn is_held(error: &BackendError) -> bool {
    error.source.get_ref().is_some_and(|e| e.is::<ImageInUse>())
}

/// Which of these images, now that they are locked, is not as the source says that it has left it, as a
/// sentence. Of an image that the source does not name nothing is known: it may be a copy of its own.
pub(super) fn unlike(images: &[DiskImage], left: &Value) -> io::Result<Option<String>> {
    if left.is_null() {
        return Ok(None);
    }
    let left: Vec<ImageStamp> = serde_json::from_value(left.clone())?;
    for image in images.iter().filter(|image| image.arbitrates()) {
        let now = image.stamp()?;
        let same = left.iter().find(|left| now.is_of_same_image(left));
        if same.is_some_and(|left| !now.is_as_left(left)) {
            return Ok(Some(format!(
                "the disk image {} is not as the source left it when it gave the order to run the guest: \
                 the guest has gone on elsewhere since, and must not run here with the memory it had then",
                image.path.display()
            )));
        }
    }
    Ok(None)
}

/// Who holds the disks, by the one that tells most.
pub(super) fn holder(images: &[DiskImage]) -> io::Result<Holder> {
    let mut someone = None;
    for image in images.iter().filter(|image| image.arbitrates()) {
        let path = image.path.display();
        match image.holder()? {
            ImageHolder::Nobody => {}
            ImageHolder::Someone => someone = Some(image.path.clone()),
            ImageHolder::StartedGuest => {
                return Ok(Holder::RunningGuest(format!(
                    "the disk image {path} is held by a mini-vmm in which the guest has started"
                )));
            }
        }
    }
    Ok(someone.map_or(Holder::Nobody, |path: PathBuf| {
        Holder::Someone(format!("the disk image {} is held by another process", path.display()))
    }))
}
