# An example: the guests of microvm.nix, whose units microvm@NAME.service run one QEMU each, stopped by
# qkilld-stop. The unit asks the guest first; what it does not do in time is judged by evidence.
{ config, ... }:

{
  imports = [ ./module.nix ];

  services.qkilld = {
    enable = true;
    stopGuestsAtShutdown = true;
    settings.Policy = {
      GraceSec = "30s";
      Powerdown = true;
    };
  };

  systemd.services."microvm@" = {
    serviceConfig = {
      ExecStop = [ "+-${config.services.qkilld.package}/bin/qkilld-stop" ];
      NotifyAccess = "exec";
      TimeoutStopSec = "90s";
    };
  };
}
