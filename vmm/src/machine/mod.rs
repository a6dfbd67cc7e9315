//! One machine: its RAM, its vCPUs, its board, and the order in which they stop and go on.

mod boot;
mod crew;
mod error;
mod firmware;
mod mapping;
mod vcpus;

use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use arch::cpu_model::{CpuModel, CpuModelName};
use arch::cpuid::CpuProfile;
use arch::host::KvmHost;
use arch::irqchip::IrqchipState;
use arch::msr::Msr;
use arch::trial::VcpuNeeds;
use arch::vcpu_state::VcpuState;
use arch::wire::{Loss, Registers, WireContext, XsaveLayout};
use devices::bus::IoBus;
use kvm_ioctls::VmFd;

pub use error::MachineError;

use crate::board::{Board, BoardError, BoardParts};
use crate::clock::VirtualClock;
use crate::config::{self, Config};
use crate::event_loop::{EventLoop, IoThread};
use crate::kvm::{self, DirtyLog, KvmIoEvents, KvmMsi, KvmRouting};
use crate::memory::Ram;
use crate::power::{MachineEvent, MachineEvents};
use crate::timers::{TimerBell, Timers};
use crate::vcpu::{Vcpu, install_kick_handler};

use crew::Crew;
use mapping::Mapping;

/// How long a vCPU may take to leave the kernel. It does so within microseconds unless the host
/// is overloaded; a guest cannot hold it up.
const PAUSE_DEADLINE: Duration = Duration::from_secs(10);

/// What the machine was when it was switched on, to be that again after a reset.
struct PowerOn {
    vcpus: Vec<VcpuState>,
    chips: IrqchipState,
}

/// A machine. Its vCPUs stand still until [`resume`](Self::resume).
///
/// Fields are dropped in this order: vCPUs first, so that nobody uses a device that is going.
pub struct Machine {
    vcpus: Vec<Vcpu>,
    /// How many threads can run at a time.
    processors: usize,
    /// Those that stand by.
    crew: Mutex<Option<Arc<Crew>>>,
    /// Kept for its thread, which ends when this is dropped.
    _io: IoThread,
    /// The devices and how they are wired.
    pub board: Board,
    bell: Arc<TimerBell>,
    /// The machine's own clock.
    pub clock: Arc<VirtualClock>,
    bus: Arc<IoBus>,
    power_on: PowerOn,
    /// What KVM offers here.
    pub host: KvmHost,
    /// What CPUID tells a guest that starts here.
    pub cpu: CpuProfile,
    /// What CPUID could tell a guest here at most.
    pub host_cpu: CpuProfile,
    /// Where the host's processor keeps extended state.
    pub xsave: XsaveLayout,
    /// The memory slots and their dirty logs, or the vCPUs' dirty rings.
    pub dirty_log: Arc<DirtyLog>,
    /// The VM in the kernel.
    pub vm: Arc<VmFd>,
    /// Its memory; last, since KVM and devices point into it.
    pub ram: Ram,
    config: Config,
}

fn cpu_model(config: &config::CpuConfig) -> CpuModel {
    let name = match config.model {
        config::CpuModel::Host => CpuModelName::Host,
        config::CpuModel::X86_64V2 => CpuModelName::X86_64V2,
        config::CpuModel::X86_64V3 => CpuModelName::X86_64V3,
    };
    CpuModel { name, migratable: config.migratable }
}

impl Machine {
    /// Builds the machine of `config`, switched on and standing at the first instruction of its
    /// kernel, or blank if it waits for a migration.
    pub fn new(config: &Config, events: &MachineEvents) -> Result<Self, MachineError> {
        if let Some(file) = &config.firmware {
            // Needed much later, when nobody is there to correct the path.
            crate::rom::read_bios(Some(file))?;
        }
        install_kick_handler().map_err(MachineError::host("cannot install a signal handler"))?;
        let kvm = kvm::open()?;
        let most = u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX);
        if config.smp > most {
            return Err(MachineError::TooManyCpus { wanted: config.smp, most });
        }
        let vm = kvm::create_vm(&kvm)?;
        let host = KvmHost::probe(&kvm, &vm)?;
        let host_cpu = CpuProfile::host(&kvm)?;
        let cpu = host_cpu.for_model(cpu_model(&config.cpu))?;
        let xsave = XsaveLayout::new(&host_cpu);
        host.setup_vm(&vm)?;
        let ram = match config.shared_memory {
            true => Ram::new_shared(config.memory.0, cpu.phys_bits())?,
            false => Ram::new(config.memory.0, cpu.phys_bits())?,
        };
        if config.prealloc {
            ram.allocate()?;
        }
        // SAFETY: the machine keeps `ram` longer than anything that holds the VM's descriptor.
        let dirty_log = unsafe { DirtyLog::new(vm.clone(), ram.slots(), config.dirty_ring) }?;
        let dirty_log = Arc::new(dirty_log);
        // KVM waits for most of the time that this takes, and nothing of what comes meanwhile needs the memory.
        let mapping = Mapping::begin(&dirty_log)?;

        let bus = Arc::new(IoBus::new());
        let clock = Arc::new(VirtualClock::default());
        let bell = TimerBell::new().map_err(MachineError::host("cannot make an eventfd"))?;
        let mut io = EventLoop::new()?;
        let routing = KvmRouting::new(vm.clone())?;
        let board = Board::build(BoardParts {
            config,
            ram: &ram,
            bus: &bus,
            clock: &clock,
            bell: &bell,
            routing: &routing,
            msi: Arc::new(KvmMsi(routing.clone())),
            doorbells: Arc::new(KvmIoEvents(vm.clone())),
            events,
            io: &mut io,
        })?;
        let timers = Timers::new(bell.clone(), clock.clone(), board.timed.clone())
            .map_err(MachineError::host("cannot make timers"))?;
        io.add(Arc::new(Mutex::new(timers)));

        let (mut vcpus, mut states) = (Vec::new(), Vec::new());
        for index in 0..config.smp {
            let fd = vm
                .create_vcpu(index.into())
                .map_err(|e| kvm::KvmError::ioctl(format!("KVM_CREATE_VCPU {index}"), e))?;
            dirty_log.add_vcpu(&fd)?;
            arch::vcpu_init::init_vcpu(index, config.smp, &fd, &cpu, &host)?;
            states.push(VcpuState::capture(index, &fd, &host)?);
            let died = events.clone();
            vcpus.push(Vcpu::spawn(
                index,
                kvm::second_handle(&vm, &fd)?,
                fd,
                bus.clone(),
                ram.guest().clone(),
                dirty_log.clone(),
                events.pending().clone(),
                Arc::new(move |report| died.send(MachineEvent::Crashed(Box::new(report)))),
            )?);
        }
        Vcpu::know_each_other(&vcpus);
        mapping.end()?;
        let power_on = PowerOn { vcpus: states, chips: IrqchipState::capture(&vm)? };
        let machine = Self {
            vcpus,
            processors: available_parallelism().map_or(1, NonZero::get),
            crew: Mutex::default(),
            _io: io.start()?,
            board,
            bell,
            clock,
            bus,
            power_on,
            host,
            cpu,
            host_cpu,
            xsave,
            dirty_log,
            vm,
            ram,
            config: config.clone(),
        };
        machine.follow_pam();
        if config.migrate_listen.is_some() {
            // Until the guest is here: a byte that a serial port took now would be overwritten by
            // the state that comes.
            machine.pause_devices();
        } else {
            machine.board.open_backends().map_err(BoardError::from)?;
            machine.boot()?;
        }
        Ok(machine)
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// Stops every vCPU; when one does not stop, all go on and the error says which.
    pub fn pause_vcpus(&self) -> Result<(), MachineError> {
        for vcpu in &self.vcpus {
            vcpu.ask_pause();
        }
        for vcpu in &self.vcpus {
            if let Err(e) = vcpu.wait_paused(PAUSE_DEADLINE) {
                self.vcpus.iter().for_each(Vcpu::resume);
                return Err(e.into());
            }
        }
        self.bell.set_running(false);
        Ok(())
    }

    /// Keeps a running vCPU out of the guest until then, or lets it back; returns at once.
    pub fn rest_vcpu(&self, index: usize, until: Option<Instant>) {
        if let Some(vcpu) = self.vcpus.get(index) {
            vcpu.rest(until);
        }
    }

    /// Brings every device to a stand-still: requests in flight are finished, disks flushed, and
    /// nothing is written to guest memory or to a back end any more.
    pub fn pause_devices(&self) {
        for device in &self.board.devices {
            device.lock().unwrap_or_else(PoisonError::into_inner).pause();
        }
    }

    /// Lets devices and vCPUs go on; [`catch_up`](Self::catch_up) follows. Gives the time at which all vCPUs were let go.
    pub fn resume(&self) -> Instant {
        self.resume_devices();
        self.tell_guests_they_stood_still();
        self.bell.set_running(true);
        Vcpu::resume_all(&self.vcpus)
    }

    /// Does what a guest that has just been let run did not wait for. Nothing comes of it if it stands still again.
    pub fn catch_up(&self) {
        self.board.catch_up();
        self.dismiss();
    }

    /// Lets the devices go on while the vCPUs stand still.
    pub fn resume_devices(&self) {
        for device in &self.board.devices {
            device.lock().unwrap_or_else(PoisonError::into_inner).resume();
        }
    }

    /// A guest's watchdogs would take the time for a hang (Linux, api.rst, KVM_KVMCLOCK_CTRL).
    fn tell_guests_they_stood_still(&self) {
        for vcpu in self.vcpus.iter().filter_map(|vcpu| vcpu.paused().ok()) {
            // A guest that does not use kvmclock has nothing to be told (EINVAL).
            let _ = vcpu.kvmclock_ctrl();
        }
    }

    /// What each vCPU needs of a host, one after the other, so that of a guest that runs only one
    /// stands still at a time, for some microseconds.
    pub fn look_at_vcpus(&self) -> Result<Vec<VcpuNeeds>, MachineError> {
        let mut all = Vec::new();
        for vcpu in &self.vcpus {
            let (index, host) = (vcpu.index(), self.host.clone());
            all.push(vcpu.peek(PAUSE_DEADLINE, move |fd| VcpuNeeds::capture(index, fd, &host))??);
        }
        Ok(all)
    }

    /// What of each vCPU's registers a QEMU would lose, by the vCPUs' indices; they are looked at as in
    /// [`look_at_vcpus`](Self::look_at_vcpus).
    pub fn lost_to_qemu(&self) -> Result<Vec<Vec<Loss>>, MachineError> {
        let context = self.wire_context(0);
        let mut all = Vec::new();
        for vcpu in &self.vcpus {
            let (index, host) = (vcpu.index(), self.host.clone());
            let now =
                vcpu.peek(PAUSE_DEADLINE, move |fd| Registers::capture(index, fd, &host))??;
            all.push(now.lost(self.power_on_msrs(index), &context));
        }
        Ok(all)
    }

    /// A vCPU's model-specific registers when the machine was switched on; none if there is no such vCPU.
    pub fn power_on_msrs(&self, index: u32) -> &[Msr] {
        self.power_on.vcpus.get(index as usize).map_or(&[], |vcpu| &vcpu.msrs)
    }

    /// The vCPUs and the chips as they were when the machine was switched on.
    pub fn power_on_state(&self) -> (&[VcpuState], &IrqchipState) {
        (&self.power_on.vcpus, &self.power_on.chips)
    }

    /// What the conversions to and from QEMU's layouts need to know, at this virtual time.
    pub fn wire_context(&self, virtual_ns: i64) -> WireContext {
        WireContext {
            virtual_ns,
            phys_bits: self.cpu.phys_bits(),
            xsave: self.xsave.clone(),
            host: self.host.clone(),
        }
    }
}
