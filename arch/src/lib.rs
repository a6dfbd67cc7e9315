//! x86-64 and KVM: memory layout, boot, ACPI, CPUID, vCPU and interrupt controller state.
