# services.qkilld for NixOS. Parsed by `make packages`, never evaluated: see README.md beside this.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.qkilld;
  inherit (lib)
    mkEnableOption
    mkIf
    mkOption
    types
    ;
  span = types.strMatching "infinity|[0-9.]+ ?[a-z]*( [0-9.]+ ?[a-z]+)*";
  policy = {
    freeformType = types.attrsOf types.str;
    options = lib.genAttrs [ "GraceSec" "StallSec" "StorageStallSec" "MaxSec" "ReapSec" "PowerdownSec" ] (
      name:
      mkOption {
        type = types.nullOr span;
        default = null;
        description = "${name}= of qkilld.conf(5), a time span as in systemd.time(7).";
      }
    );
  };
  bools = lib.genAttrs [ "Powerdown" "Yank" ] (
    name:
    mkOption {
      type = types.nullOr types.bool;
      default = null;
      description = "${name}= of qkilld.conf(5).";
    }
  );
  section = types.submodule { inherit (policy) freeformType; options = policy.options // bools; };
  value = v: if v == true then "yes" else if v == false then "no" else v;
  set = lib.filterAttrs (_: v: v != null);
in
{
  options.services.qkilld = {
    enable = mkEnableOption "qkilld, which stops QEMU guests without losing what they wrote";

    package = mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      description = "The package of qkilld.";
    };

    stopGuestsAtShutdown = mkOption {
      type = types.bool;
      default = false;
      description = "Whether to enable qkilld-guests.service(8), which stops all guests at shutdown.";
    };

    settings = mkOption {
      default = { };
      description = "qkilld.conf(5).";
      type = types.submodule {
        options.Policy = mkOption {
          type = section;
          default = { };
          description = "Time spans, and what to do before SIGTERM and SIGKILL.";
        };
        options.Target.Executables = mkOption {
          type = types.listOf types.str;
          default = [ ];
          description = "Globs of executables that are QEMU. If empty, the defaults of qkilld apply.";
        };
      };
    };
  };

  config = mkIf cfg.enable {
    environment.systemPackages = [ cfg.package ];
    services.dbus.packages = [ cfg.package ];
    systemd.packages = [ cfg.package ];
    security.polkit.enable = true;

    environment.etc."qkilld/qkilld.conf".text = lib.generators.toINI { } (
      {
        Policy = lib.mapAttrs (_: value) (set cfg.settings.Policy);
      }
      // lib.optionalAttrs (cfg.settings.Target.Executables != [ ]) {
        Target.Executables = lib.concatStringsSep " " cfg.settings.Target.Executables;
      }
    );

    systemd.services.qkilld-guests = mkIf cfg.stopGuestsAtShutdown {
      wantedBy = [ "multi-user.target" ];
    };
  };
}
